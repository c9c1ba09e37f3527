"""Shares are probabilities with a floor, follow what is earned, and only what is better for sure is promoted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contexts import CONTEXTS, context_of
from cluster.errors import LearningError
from cluster.learning.bandit import BanditSettings, check, judged, rewarded, shares
from cluster.learning.off_policy import Logged
from cluster.learning.records import Record

logged = st.builds(
    Logged,
    st.sampled_from([*CONTEXTS, "unheard of"]),
    st.sampled_from("abc"),
    st.floats(0.1, 1.0),
    st.floats(0.0, 1.0),
)


@settings(max_examples=40)
@given(st.lists(logged, max_size=60), st.floats(0.01, 1 / 3), st.integers(0, 5))
def test_shares_add_up_and_are_at_least_the_floor(logs: list[Logged], floor: float, seed: int) -> None:
    wanted = BanditSettings(floor=floor, seed=seed)
    found = shares(logs, ("a", "b", "c"), wanted)
    assert found.keys() == {*CONTEXTS, ""}
    for of_context in found.values():
        assert sum(of_context.values()) == pytest.approx(1.0, abs=1e-9)
        assert min(of_context.values()) >= floor - 1e-9
    assert shares(logs, ("a", "b", "c"), wanted) == found


def simulated(
    count: int, best: dict[str, str], seed: int
) -> tuple[list[Logged], dict[str, dict[str, float]]]:
    """Looks at its own rewards every 50 requests."""
    dice, wanted = np.random.default_rng(seed), BanditSettings(floor=0.1)
    logs: list[Logged] = []
    now = shares(logs, ("a", "b"), wanted)
    for number in range(count):
        if number % 50 == 0:
            now = shares(logs, ("a", "b"), wanted)
        context = CONTEXTS[dice.integers(len(CONTEXTS))]
        arm = "a" if dice.random() < now[context]["a"] else "b"
        reward = dice.random() < (0.7 if best[context.split("/")[0]] == arm else 0.4)
        logs.append(Logged(context, arm, now[context][arm], float(reward)))
    return logs, now


def test_each_context_gets_what_is_best_there() -> None:
    logs, now = simulated(1500, {"chat": "a", "text": "b"}, 1)
    assert now["chat/short"]["a"] > 0.8 and now["text/long"]["b"] > 0.8
    assert judged(logs, ("a", "b"), "a", BanditSettings()).promote == "", "neither is better for all"


def test_what_is_better_is_promoted_and_what_is_as_good_is_not() -> None:
    better, _ = simulated(1500, {"chat": "b", "text": "b"}, 2)
    found = judged(better, ("a", "b"), "a", BanditSettings())
    assert found.promote == "b" and "more" in found.reasons["b"] and found.reasons["a"] == "it serves"
    b = found.arms[1]
    assert b.gain.low > 0 and b.dr.low < 0.7 < b.dr.high and b.snips.low < 0.7 < b.snips.high
    dice = np.random.default_rng(3)
    equal = [Logged("chat/short", "ab"[number % 2], 0.5, float(dice.random() < 0.5)) for number in range(400)]
    assert judged(equal, ("a", "b"), "a", BanditSettings()).promote == ""
    few = judged(better[:20], ("a", "b"), "a", BanditSettings())
    assert "say too little" in few.reasons["b"]


def test_an_answer_earns_what_was_said_first_of_it() -> None:
    def request(name: str, manifest: str = "a", propensity: float | None = 0.3) -> Record:
        return Record("request", name, 1.0, manifest=manifest, context="chat/short", propensity=propensity)

    def said(name: str, score: float) -> Record:
        return Record("feedback", name, 2.0, score=score)

    records = [
        request("one"),
        request("two", "b", 0.7),
        request("by hash", propensity=None),
        request("other", "z"),
        said("two", 1.0),
        said("one", 0.0),
        said("two", 0.0),
        said("by hash", 1.0),
        said("other", 1.0),
        said("nobody's", 1.0),
    ]
    expected = [Logged("chat/short", "b", 0.7, 1.0), Logged("chat/short", "a", 0.3, 0.0)]
    assert rewarded(records, ("a", "b")) == expected
    assert rewarded(records[:5], ("a", "b")) == expected[:1], "more records only add to it"


def test_versions_that_can_not_share_are_refused() -> None:
    for arms, floor, words in [
        (("a",), 0.1, "two versions or more"),
        (("a", "a"), 0.1, "each once"),
        (("a", "b", "c"), 0.4, "learning.bandit.floor to 0.333 at most|can't have 0.4"),
        (("a", "b"), 0.0, "can't have 0"),
    ]:
        with pytest.raises(LearningError, match=words):
            check(arms, floor)


def test_contexts_are_a_few() -> None:
    assert context_of("/v1/chat/completions", 10) == "chat/short"
    assert context_of("/v1/completions", 1000) == "text/middle"
    assert {
        context_of(path, size)
        for path in ("/v1/chat/completions", "/v1/completions")
        for size in (1, 999, 10**6)
    } == set(CONTEXTS)
