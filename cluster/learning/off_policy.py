"""What another way of choosing versions would have earned, from requests that were given theirs by lot.

Each request has its context, the version that it got, the probability with which it did (its propensity), and what it
earned. Three estimates of a policy's mean reward:

    ips     rewards weighed by how much more often the policy would have chosen so (Horvitz and Thompson, 1952);
            without bias, and wild where propensities are small
    snips   the same, over the weights' own sum (Swaminathan and Joachims, "The Self-Normalized Estimator for
            Counterfactual Learning", 2015); a little bias, less variance
    dr      a model of rewards, and the weighed part of them that it does not foresee (Dudik, Langford and Li, "Doubly
            Robust Policy Evaluation and Learning", 2011); without bias whatever the model is like. The model is of the
            other half of the requests, so that none foresees itself.

Intervals are of the normal distribution. They hold for one look; who looks again and again decides by
`favours`, which stays valid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from cluster.betting import Bettor
from cluster.errors import LearningError

# Rewards as the mean's that a mean of few is drawn towards.
_PRIOR: Final = 4.0

Policy = Mapping[str, Mapping[str, float]]
"""Context → version → probability; "" for any other context."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One request of which it is known what it earned."""

    context: str
    arm: str
    """Version that it got."""
    propensity: float
    reward: float
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and bounds between which it is with the asked-for probability."""

    mean: float
    low: float
    high: float


def always(arm: str) -> Policy:
    """The policy that gives everybody one version."""
    return {"": {arm: 1.0}}


def ips(logs: Sequence[Logged], policy: Policy, level: float = 0.95) -> Estimate:
    """LearningError for no requests, or propensities that are none; as for all of these."""
    return _estimate(_weights(logs, policy) * _rewards(logs), level)


def snips(logs: Sequence[Logged], policy: Policy, level: float = 0.95) -> Estimate:
    """A policy that would never have chosen what was chosen can't be told: 0 to 1."""
    weights, rewards = _weights(logs, policy), _rewards(logs)
    total = float(weights.sum())
    if not total:
        return Estimate(0.5, 0.0, 1.0)
    mean = float(weights @ rewards) / total
    error = math.sqrt(float((weights**2) @ ((rewards - mean) ** 2))) / total
    return _around(mean, error, level)


def doubly_robust(logs: Sequence[Logged], policy: Policy, level: float = 0.95) -> Estimate:
    """See above."""
    return _estimate(_scores(logs, policy), level)


def gain(logs: Sequence[Logged], policy: Policy, over: Policy, level: float = 0.95) -> Estimate:
    """By how much more a policy earns than another one, doubly robust: both are told by the same requests."""
    return _estimate(_scores(logs, policy) - _scores(logs, over), level)


def favours(logs: Sequence[Logged], arm: str, over: str, floor: float) -> Bettor:
    """A bettor on "this version earns more than that one", over requests in the order in which rewards became known.

    While it does not, its fortune ever reaches 1 / alpha with probability alpha at most, however often one looks, and
    however propensities were chosen by what was earned before (see `cluster.betting`; Waudby-Smith et al.,
    "Anytime-valid off-policy inference for contextual bandits", 2024). `floor`: no propensity is below it.
    """
    _check(logs)
    bettor = Bettor()
    for one in logs:
        sign = (one.arm == arm) - (one.arm == over)
        # Rewards are halved about their middle, which leaves the mean as it is and the bets within -1 and 1.
        bettor = bettor.after(sign * (one.reward - 0.5) * 2 * min(1.0, floor / one.propensity))
    return bettor


def _scores(logs: Sequence[Logged], policy: Policy) -> np.ndarray:
    weights, rewards = _weights(logs, policy), _rewards(logs)
    models = [_Model(logs[1::2]), _Model(logs[0::2])]
    found = np.empty(len(logs))
    for number, (one, weight, reward) in enumerate(zip(logs, weights, rewards, strict=True)):
        model = models[number % 2]
        expected = sum(p * model(one.context, arm) for arm, p in _of(policy, one.context).items())
        found[number] = expected + weight * (reward - model(one.context, one.arm))
    return found


class _Model:
    """Mean rewards by context and version, drawn towards the version's, and that towards the mean of all."""

    def __init__(self, logs: Sequence[Logged]) -> None:
        self._sums: dict[tuple[str, ...], tuple[float, int]] = {}
        for one in logs:
            for key in ((), (one.arm,), (one.context, one.arm)):
                total, count = self._sums.get(key, (0.0, 0))
                self._sums[key] = total + one.reward, count + 1

    def __call__(self, context: str, arm: str) -> float:
        mean = 0.5
        for key in ((), (arm,), (context, arm)):
            total, count = self._sums.get(key, (0.0, 0))
            mean = (total + _PRIOR * mean) / (count + _PRIOR)
        return mean


def _weights(logs: Sequence[Logged], policy: Policy) -> np.ndarray:
    _check(logs)
    return np.array([_of(policy, one.context).get(one.arm, 0.0) / one.propensity for one in logs])


def _rewards(logs: Sequence[Logged]) -> np.ndarray:
    return np.array([one.reward for one in logs])


def _of(policy: Policy, context: str) -> Mapping[str, float]:
    return policy.get(context) or policy.get("") or {}


def _check(logs: Sequence[Logged]) -> None:
    if not logs:
        raise LearningError("nothing is known of what requests earned", "wait for feedback")
    if (wrong := next((one for one in logs if not 0 < one.propensity <= 1), None)) is not None:
        raise LearningError(f"{wrong.propensity:g} is no propensity", "above 0 and 1 at most is expected")


def _estimate(scores: np.ndarray, level: float) -> Estimate:
    error = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.inf
    return _around(float(scores.mean()), error, level)


def _around(mean: float, error: float, level: float) -> Estimate:
    reach = NormalDist().inv_cdf(0.5 + level / 2) * error
    return Estimate(mean, mean - reach, mean + reach)
