"""Which version earns most, request by request: a contextual bandit over versions that are loaded.

Every version has a linear model of what it earns in a context; each context's requests are shared out by how probable
it is that a version is the best one there (Thompson sampling for linear rewards: Agrawal and Goyal, "Thompson Sampling
for Contextual Bandits with Linear Payoffs", 2013), and none gets less than the floor, so that what each would have
earned stays measurable. Shares are fixed until the next look, which makes them the propensities to the bit.

A version is promoted if it earns more than the one that serves by two measures: a bet that stays valid however often
it is looked at, and the lower bound of the doubly robust estimate of how much more. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cluster.contexts import CONTEXTS
from cluster.errors import LearningError
from cluster.learning.off_policy import (
    Estimate,
    Logged,
    always,
    doubly_robust,
    favours,
    gain,
    ips,
    snips,
)
from cluster.learning.records import Record

_DRAWS: Final = 4000
# Of one reward about what its context lets expect: rewards are of 0 to 1.
_DEVIATION: Final = 0.5
_FEATURES: Final = tuple(sorted({part for context in CONTEXTS for part in context.split("/")}))


@dataclass(frozen=True, slots=True)
class BanditSettings:
    """How it chooses, and what is asked of a version that is to be promoted."""

    floor: float = 0.1
    """Probability with which any request gets any of the versions, at least."""
    alpha: float = 0.01
    """Probability that a version is promoted that does not earn more, at most."""
    level: float = 0.95
    """Of the intervals, and of the bound that is asked for."""
    fewest: int = 50
    """Requests with a reward that a version must have had, and the one that serves."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ArmReport:
    """What is known of one version."""

    manifest: str
    pulls: int
    """Requests that earned something."""
    mean: float | None
    """Of what these earned; None without any."""
    ips: Estimate
    snips: Estimate
    dr: Estimate
    gain: Estimate
    """Of always this version over always the one that serves, doubly robust."""
    evidence: float
    """Fortune of the bet that it earns more, as a logarithm."""


@dataclass(frozen=True, slots=True)
class BanditReport:
    """What is known of all of them."""

    arms: tuple[ArmReport, ...]
    requests: int
    promote: str
    """The version that passes; "" for none."""
    reasons: Mapping[str, str]
    """Version → why it does not, or does."""


def check(arms: Sequence[str], floor: float) -> None:
    """LearningError for versions that can't share requests."""
    if len(set(arms)) != len(arms) or len(arms) < 2:
        raise LearningError("a bandit is over two versions or more, each once", "name another version")
    if not 0 < floor * len(arms) <= 1:
        raise LearningError(
            f"{len(arms)} versions can't have {floor:g} of requests each",
            f"set learning.bandit.floor to {1 / len(arms):.3g} at most, or take fewer versions",
        )


def rewarded(records: Iterable[Record], arms: Sequence[str]) -> list[Logged]:
    """What requests earned whose version was one of these by lot, in the order in which that became known.

    An answer earns what was said of it first: later words would change what was counted already.
    """
    asked: dict[str, Record] = {}
    found = []
    for record in records:
        if record.kind == "request" and record.propensity is not None and record.manifest in arms:
            asked[record.id] = record
        elif record.kind == "feedback" and record.score is not None:
            request = asked.pop(record.id, None)
            if request is not None and request.propensity is not None:
                found.append(Logged(request.context, request.manifest, request.propensity, record.score))
    return found


def shares(
    logs: Sequence[Logged], arms: Sequence[str], settings: BanditSettings
) -> dict[str, dict[str, float]]:
    """Context → version → share of its requests; each at least the floor, and together 1.

    The same for the same rewards. LearningError for a floor that leaves too little.
    """
    check(arms, settings.floor)
    dice = np.random.default_rng(settings.seed)
    inputs = np.array([_features(context) for context in CONTEXTS])
    drawn = []
    for arm in arms:
        mine = [one for one in logs if one.arm == arm]
        rows = np.array([_features(one.context) for one in mine]).reshape(len(mine), inputs.shape[1])
        rewards = np.array([one.reward - 0.5 for one in mine])
        precision = np.eye(inputs.shape[1]) + rows.T @ rows / _DEVIATION**2
        covariance = np.linalg.inv(precision)
        mean = covariance @ (rows.T @ rewards) / _DEVIATION**2
        drawn.append(dice.multivariate_normal(mean, covariance, _DRAWS) @ inputs.T)
    best = np.argmax(np.array(drawn), axis=0)
    free = 1 - settings.floor * len(arms)
    found: dict[str, dict[str, float]] = {}
    for column, context in enumerate(CONTEXTS):
        counts = np.bincount(best[:, column], minlength=len(arms))
        found[context] = {
            arm: settings.floor + free * float(count) / _DRAWS
            for arm, count in zip(arms, counts, strict=True)
        }
    # A router of another version may know other contexts.
    found[""] = dict.fromkeys(arms, 1 / len(arms))
    return found


def judged(
    logs: Sequence[Logged], arms: Sequence[str], serving: str, settings: BanditSettings
) -> BanditReport:
    """What each version would have earned, and which one is to be promoted. LearningError for no rewards at all."""
    # Each of the others may err in its part.
    others = max(1, len(arms) - 1)
    level = 1 - (1 - settings.level) / others
    reports, reasons = [], {}
    for arm in arms:
        mine = [one.reward for one in logs if one.arm == arm]
        reports.append(
            ArmReport(
                arm,
                len(mine),
                sum(mine) / len(mine) if mine else None,
                ips(logs, always(arm), settings.level),
                snips(logs, always(arm), settings.level),
                doubly_robust(logs, always(arm), settings.level),
                gain(logs, always(arm), always(serving), level),
                favours(logs, arm, serving, settings.floor).log_fortune,
            )
        )
    of_serving = next(one for one in reports if one.manifest == serving)
    passing = []
    for one in reports:
        if one.manifest == serving:
            reasons[one.manifest] = "it serves"
        elif min(one.pulls, of_serving.pulls) < settings.fewest:
            reasons[one.manifest] = (
                f"{min(one.pulls, of_serving.pulls)} requests with a reward say too little, "
                f"{settings.fewest} are asked for"
            )
        elif one.gain.low <= 0:
            reasons[one.manifest] = f"it does not earn more for sure ({one.gain.low:+.3f} at least)"
        elif one.evidence < math.log(others / settings.alpha):
            reasons[one.manifest] = (
                f"the bet on it has won {math.exp(one.evidence):.3g}-fold, "
                f"{others / settings.alpha:.3g}-fold is asked for"
            )
        else:
            reasons[one.manifest] = f"it earns {one.gain.mean:+.3f} more, {one.gain.low:+.3f} at least"
            passing.append(one)
    best = max(passing, key=lambda one: one.gain.low, default=None)
    return BanditReport(tuple(reports), len(logs), best.manifest if best is not None else "", reasons)


def _features(context: str) -> list[float]:
    parts = context.split("/")
    return [1.0, *(float(feature in parts) for feature in _FEATURES)]
