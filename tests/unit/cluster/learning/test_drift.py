"""Tracks of bits per byte: what counts as evidence, when it is an alarm, and when one is over."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.learning.drift import DriftSettings, DriftState, Reference, Track, alarmed, answered, looked
from cluster.learning.journal import Phase, Round

SETTINGS = DriftSettings(warm=16)
TEXTS = [f"t{n}" for n in range(40)]


def read(track: Track, manifest: str, factor: float = 1.0, live: list[float] | None = None) -> Track:
    """All texts, each of which takes another number of bits."""
    held = [(mark, (1.0 + n / 10) * factor) for n, mark in enumerate(TEXTS)]
    return looked(track, manifest, held, live or [], SETTINGS, 5.0)


def ended(domain: str, phase: Phase, number: int = 1) -> Round:
    return replace(Round(number, domain, 0, 1, "base", 0, 0, 0.0), phase=phase)


def test_what_is_forgotten_little_by_little_is_an_alarm() -> None:
    """Each version is worse by one per cent, which every gate lets through."""
    track = read(Track(), "v0")
    assert track.alarm is None and track.points[-1].rise is None
    for number in range(1, 12):
        track = read(track, f"v{number}", 1.01**number)
        if track.alarm is not None:
            break
    assert track.alarm is not None and track.alarm.what == "holdout" and 3 <= number <= 8
    assert "+" in track.alarm.said and track.alarms == 1
    again = read(track, "v99", 2.0)
    assert again.alarm == track.alarm and again.alarms == 1, "one alarm until it is answered"


def test_a_version_reads_a_text_once() -> None:
    track = read(Track(), "v0")
    assert track.unread("v0", [*TEXTS, "new"]) == ["new"]
    assert track.unread("v1", TEXTS) == TEXTS


def test_what_gets_better_is_none() -> None:
    track = read(Track(), "v0")
    for number in range(1, 20):
        track = read(track, f"v{number}", 0.98**number)
    assert track.alarm is None


def test_live_texts_are_held_against_the_first_ones() -> None:
    dice = np.random.default_rng(2)
    calm = dice.gamma(16.0, 0.125, 600).tolist()
    track = looked(Track(), "v0", [], calm, SETTINGS, 1.0)
    assert track.alarm is None and track.reference.count == 16 and track.live.seen == 584
    track = looked(track, "v0", [], (dice.gamma(16.0, 0.25, 60)).tolist(), SETTINGS, 2.0)
    assert track.alarm is not None and track.alarm.what == "live" and track.alarm.at == 2.0


def test_no_number_is_the_worst() -> None:
    track = read(Track(), "v0")
    assert read(track, "v1", math.nan).alarm is not None
    assert read(Track(), "v1", math.inf).first == {}


@given(st.lists(st.floats(0.1, 8.0), min_size=2, max_size=50))
def test_the_reference_is_the_mean_and_somewhat_above(bits: list[float]) -> None:
    found = Reference()
    for one in bits:
        found = found.after(one)
    assert found.mean == pytest.approx(np.mean(bits))
    deviation = float(np.std(bits)) / math.sqrt(len(bits))
    assert found.high == pytest.approx(found.mean + 2.33 * deviation, abs=1e-3)


def test_a_round_ends_an_alarm() -> None:
    worse = read(read(Track(), "v0"), "v1", 1.2)
    state = DriftState({"law": worse, "code": worse})
    assert alarmed(state) == {"law", "code"}
    state = answered(state, [ended("law", "promoted"), ended("code", "refused", 2)])
    law, code = state.tracks["law"], state.tracks["code"]
    assert alarmed(state) == set() and state.rounds == 2
    assert law.first == {} and law.points == worse.points, "what it learnt is what it is held against now"
    assert code.first == worse.first and code.holdout.seen == 0, "there has to be new evidence"
    again = answered(replace(state, tracks={"law": worse, "code": worse}), [ended("law", "promoted")])
    assert alarmed(again) == {"law", "code"}, "an end counts once"


def test_a_round_that_was_overtaken_answers_nothing() -> None:
    state = DriftState({"law": read(read(Track(), "v0"), "v1", 1.2)})
    assert alarmed(answered(state, [ended("law", "superseded")])) == {"law"}
