"""Estimates from logs whose truth is known: without bias, within their intervals, and doubly robust the tightest."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from cluster.errors import LearningError
from cluster.learning.off_policy import (
    Estimate,
    Logged,
    Policy,
    always,
    doubly_robust,
    favours,
    gain,
    ips,
    snips,
)

REWARD = {("chat", "a"): 0.9, ("chat", "b"): 0.3, ("text", "a"): 0.2, ("text", "b"): 0.6}
BEHAVIOUR = {"chat": {"a": 0.2, "b": 0.8}, "text": {"a": 0.5, "b": 0.5}}
TARGET: Policy = {"chat": {"a": 0.9, "b": 0.1}, "text": {"a": 0.1, "b": 0.9}}
TRUTH = 0.5 * (0.9 * 0.9 + 0.1 * 0.3) + 0.5 * (0.1 * 0.2 + 0.9 * 0.6)
Estimator = Callable[..., Estimate]


def logs(count: int, seed: int, noise: bool = True) -> list[Logged]:
    dice = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        context = "chat" if dice.random() < 0.5 else "text"
        arm = "a" if dice.random() < BEHAVIOUR[context]["a"] else "b"
        expected = REWARD[context, arm]
        reward = float(dice.random() < expected) if noise else expected
        found.append(Logged(context, arm, BEHAVIOUR[context][arm], reward))
    return found


@pytest.mark.parametrize("estimator", [ips, snips, doubly_robust])
def test_estimates_have_no_bias_and_their_intervals_hold(estimator: Estimator) -> None:
    found = [estimator(logs(200, seed), TARGET) for seed in range(200)]
    means = np.array([one.mean for one in found])
    error = means.std(ddof=1) / math.sqrt(len(means))
    # Of the normalised one some bias of the order of 1 / 200 is to be expected.
    assert means.mean() == pytest.approx(TRUTH, abs=4 * error + (0.005 if estimator is snips else 0.0))
    covered = sum(one.low <= TRUTH <= one.high for one in found)
    assert covered >= 200 * 0.95 - 4 * math.sqrt(200 * 0.95 * 0.05)


def test_the_doubly_robust_estimate_varies_least() -> None:
    """Rewards are what the context says, so that a model foresees nearly all of them."""
    spread = {
        estimator: np.std([estimator(logs(200, seed, noise=False), TARGET).mean for seed in range(100)])
        for estimator in (ips, doubly_robust)
    }
    assert spread[doubly_robust] < 0.5 * spread[ips]


def test_a_model_that_foresees_nothing_does_no_harm() -> None:
    """Contexts never come again, so that the model knows no more than a mean that is right for none of them."""
    dice = np.random.default_rng(4)
    rewards = {"a": 0.9, "b": 0.1}
    arms = ["ab"[int(dice.random() < 0.2)] for _ in range(2000)]
    mine = [
        Logged(f"{number}", arm, 0.8 if arm == "a" else 0.2, float(dice.random() < rewards[arm]))
        for number, arm in enumerate(arms)
    ]
    for arm, truth in rewards.items():
        found = doubly_robust(mine, always(arm), 0.9999)
        assert found.low < truth < found.high and found.high - found.low < 0.2


def test_a_gain_is_a_difference_of_the_same_requests() -> None:
    found = gain(logs(4000, 3), always("b"), always("a"))
    assert found.low < (0.3 + 0.6) / 2 - (0.9 + 0.2) / 2 < found.high
    assert gain(logs(100, 3), TARGET, TARGET) == Estimate(0.0, 0.0, 0.0)


def test_the_bet_is_won_by_what_is_better_and_by_nothing_else() -> None:
    better = favours(logs(4000, 1), "a", "b", 0.2)
    assert better.log_fortune > math.log(100)
    equal = 0
    for seed in range(100):
        dice = np.random.default_rng(seed)
        found = [
            Logged("chat", "a" if dice.random() < 0.3 else "b", 0.0, float(dice.random() < 0.5))
            for _ in range(300)
        ]
        found = [Logged(one.context, one.arm, 0.3 if one.arm == "a" else 0.7, one.reward) for one in found]
        won = [favours(found[:count], "a", "b", 0.3).log_fortune for count in range(20, 301, 20)]
        equal += max(won) >= math.log(20)
    assert equal <= 5 + 3 * math.sqrt(5), "looked at 15 times, it is still wrong once in 20 at most"


def test_what_can_not_be_told_is_said() -> None:
    only_a = [Logged("chat", "a", 1.0, 0.5)] * 3
    assert snips(only_a, always("b")) == Estimate(0.5, 0.0, 1.0)
    assert ips([Logged("chat", "a", 0.5, 1.0)], always("a")).low == -math.inf
    with pytest.raises(LearningError, match="nothing is known"):
        ips([], always("a"))
    with pytest.raises(LearningError, match="0 is no propensity"):
        favours([Logged("chat", "a", 0.0, 1.0)], "a", "b", 0.1)
