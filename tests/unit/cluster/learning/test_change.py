"""A stationary series gives no more alarms than it may, and a shift is found however long it was quiet before."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.learning.change import Detector, gain, latest

RATE = 1e-3


def alarm_at(gains: list[float], rate: float = RATE) -> int | None:
    """After how many observations."""
    detector = Detector()
    for number, one in enumerate(gains, 1):
        detector = detector.after(one)
        if detector.alarmed(rate):
            return number
    return None


@pytest.mark.parametrize("kind", ["normal", "skewed", "two values"])
def test_false_alarms_are_as_rare_as_they_should_be(kind: str) -> None:
    """At the worst that is tolerable: a mean of just the slack. 200 series of 100; a tenth may alarm at most."""
    dice, slack, spread = np.random.default_rng(7), 0.05, 1.0
    shape = (200, 100)
    rises = {
        "normal": dice.normal(slack, 0.2, shape),
        # Bounded by the spread, so that nothing is clipped: means stay what they are.
        "skewed": dice.beta(0.5, 9.5, shape) * 1.0,
        "two values": np.where(dice.random(shape) < 0.05, 1.0, 0.0),
    }[kind]
    alarms = sum(alarm_at([gain(r, slack, spread) for r in row]) is not None for row in rises.tolist())
    # Three standard errors above what is promised, of a share of alarms.
    assert alarms / 200 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)


@given(
    before=st.lists(st.floats(-1.0, 0.02), max_size=300),
    rise=st.floats(0.03, 0.5),
    rate=st.sampled_from([1e-2, 1e-4, 1e-6]),
)
def test_a_shift_is_found_in_time_whatever_came_before(before: list[float], rise: float, rate: float) -> None:
    slack, spread = 0.02, 0.2
    detector = Detector()
    for one in before:
        detector = detector.after(gain(one, slack, spread))
    for _ in range(latest(slack, spread, rise, rate)):
        detector = detector.after(gain(rise, slack, spread))
    assert detector.alarmed(rate)


@given(st.lists(st.floats(-1.0, 1.0), max_size=200))
def test_nothing_below_the_slack_is_ever_an_alarm(rises: list[float]) -> None:
    assert alarm_at([gain(min(r, 0.02), 0.02, 0.2) for r in rises], 0.5) is None


def test_noisy_shifts_are_found_soon() -> None:
    """A tenth more, where texts differ by a quarter: on average within 400 texts, at one false alarm in 100,000."""
    dice = np.random.default_rng(3)
    found = [
        alarm_at([gain(r, 0.02, 1.0) for r in dice.normal(0.1, 0.25, 3000).tolist()], 1e-5) for _ in range(20)
    ]
    assert all(one is not None for one in found) and np.mean([one or 0 for one in found]) < 400


def test_gains_are_bounded() -> None:
    assert gain(-5.0, 0.02, 0.2) == pytest.approx(-1.0) and gain(math.inf, 0.02, 0.2) < 1.0
    assert gain(0.02, 0.02, 0.2) == 0.0
