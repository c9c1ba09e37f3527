"""A version on trial: what share of requests it gets, what is held against the one that serves, and the verdict.

Pure functions. Signals come in pairs, the candidate's and that of the version that serves, each turned into a number
between -1 and 1 that is positive where the candidate was worse; `cluster.betting` decides, and may be asked any time.

    errors      whether a request failed
    latency     seconds between two of its tokens, over thrice the median of the version that serves
    quality     nats a token by which it predicts held-out text worse, over 0.1
    feedback    by how much less users like it, of what they say at all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Final, Literal

from cluster.betting import Comparison

Kind = Literal["errors", "latency", "quality", "feedback"]

_NATS: Final = 0.1
_SLOW: Final = 3.0
_COMPARISONS: Final[Mapping[Kind, Comparison]] = {
    "errors": Comparison(tolerance=0.005, margin=0.05),
    "latency": Comparison(tolerance=0.02, margin=0.1),
    "quality": Comparison(tolerance=0.02, margin=0.2),
    "feedback": Comparison(tolerance=0.01, margin=0.1),
}
# Medians are of so many of the latest.
_RECENT: Final = 200


@dataclass(frozen=True, slots=True)
class Trial:
    """What an operator asked for."""

    manifest: str
    shares: tuple[float, ...]
    """Of requests, 0 to 1, ascending; the next one follows when it was at one for `step_s` and nothing is wrong."""
    step_s: float = 600.0
    alpha: float = 0.01
    """Probability with which a version that is as good is rolled back, or one that is not good enough promoted."""
    give_up_s: float = 86400.0
    """After how long a version that was not shown to be good is rolled back."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that ended."""

    failed: bool
    token_s: float | None
    """Seconds between two of its tokens; None of fewer than two."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What one router saw since it was last asked, in order."""

    manifest: str
    """The candidate's."""
    serving: tuple[Answered, ...] = ()
    candidate: tuple[Answered, ...] = ()
    nats: tuple[float, ...] = ()
    """By which the candidate predicted a held-out text worse, per token and text."""
    liked_serving: tuple[float, ...] = ()
    liked_candidate: tuple[float, ...] = ()
    """Users' scores, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A trial and what was seen of it."""

    trial: Trial
    began: float
    """Seconds since 1970."""
    step: int = 0
    step_began: float = 0.0
    comparisons: Mapping[Kind, Comparison] = field(default_factory=lambda: dict(_COMPARISONS))
    waiting: Mapping[Kind, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    """What has no counterpart yet: of the version that serves, and of the candidate."""
    recent: tuple[float, ...] = ()
    """Latest seconds between tokens of the version that serves."""
    requests: tuple[int, int] = (0, 0)

    @property
    def share(self) -> float:
        """Of requests that the candidate gets now."""
        return self.trial.shares[self.step]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of a trial, and why."""

    what: Literal["wait", "advance", "promote", "rollback"]
    reason: str


def begun(trial: Trial, now: float) -> Canary:
    """A trial with nothing seen. ValueError for shares that are none, or do not ascend."""
    if not trial.shares or any(not 0 < share <= 1 for share in trial.shares):
        raise ValueError(f"shares {trial.shares} are not all above 0 % and at most 100 %")
    if list(trial.shares) != sorted(set(trial.shares)):
        raise ValueError(f"shares {trial.shares} do not ascend")
    return Canary(trial, now, step_began=now)


def observed(canary: Canary, seen: Observed) -> Canary:
    """Having seen this; what is of another trial is left out."""
    if seen.manifest != canary.trial.manifest:
        return canary
    recent = (*canary.recent, *(a.token_s for a in seen.serving if a.token_s is not None))[-_RECENT:]
    slow = _SLOW * median(recent) if recent else 0.0
    canary = replace(
        canary,
        recent=recent,
        requests=(canary.requests[0] + len(seen.serving), canary.requests[1] + len(seen.candidate)),
    )
    canary = _paired(
        canary, "errors", [float(a.failed) for a in seen.serving], [float(a.failed) for a in seen.candidate]
    )
    if slow:
        canary = _paired(canary, "latency", _times(seen.serving, slow), _times(seen.candidate, slow))
    canary = _paired(
        canary, "feedback", [1 - score for score in seen.liked_serving], [1 - s for s in seen.liked_candidate]
    )
    return _compared(canary, "quality", [nats / _NATS for nats in seen.nats])


def verdict(canary: Canary, now: float) -> Verdict:
    """What to do now."""
    # Each signal may err in its share of all errors.
    alpha = canary.trial.alpha / len(_COMPARISONS)
    for kind, comparison in canary.comparisons.items():
        if comparison.is_worse(alpha):
            return Verdict("rollback", f"{kind}: {_said(kind, comparison)}, worse than tolerable")
    seen = {kind: c for kind, c in canary.comparisons.items() if c.seen}
    unsure = [kind for kind, comparison in seen.items() if not comparison.is_fine(alpha)]
    if seen and not unsure and canary.step == len(canary.trial.shares) - 1:
        facts = "; ".join(f"{kind}: {_said(kind, comparison)}" for kind, comparison in seen.items())
        return Verdict("promote", f"good enough in all that was seen ({facts})")
    if canary.step < len(canary.trial.shares) - 1 and now - canary.step_began >= canary.trial.step_s and seen:
        share = canary.trial.shares[canary.step + 1]
        return Verdict(
            "advance", f"nothing worse at {canary.share:.3g} of requests; {share:.3g} of them next"
        )
    if now - canary.began >= canary.trial.give_up_s:
        return Verdict(
            "rollback", f"not shown to be good enough in {canary.trial.give_up_s:g} s: {', '.join(unsure)}"
        )
    return Verdict("wait", f"not sure yet of {', '.join(unsure)}" if seen else "nothing to compare yet")


def advanced(canary: Canary, now: float) -> Canary:
    """At its next share."""
    return replace(canary, step=canary.step + 1, step_began=now)


def _times(answered: Sequence[Answered], slow: float) -> list[float]:
    return [min(a.token_s / slow, 1.0) for a in answered if a.token_s is not None]


def _paired(canary: Canary, kind: Kind, serving: Sequence[float], candidate: Sequence[float]) -> Canary:
    """With as many differences as there are pairs: the n-th of the one with the n-th of the other."""
    before_s, before_c = canary.waiting.get(kind, ((), ()))
    all_s, all_c = (*before_s, *serving), (*before_c, *candidate)
    pairs = min(len(all_s), len(all_c))
    # Of the version that serves there are many more: the latest are the candidate's contemporaries.
    left_s, left_c = all_s[pairs:], all_c[pairs:]
    canary = replace(canary, waiting={**canary.waiting, kind: (left_s[-_RECENT:], left_c[-_RECENT:])})
    return _compared(canary, kind, [c - s for s, c in zip(all_s[:pairs], all_c[:pairs], strict=True)])


def _compared(canary: Canary, kind: Kind, differences: Sequence[float]) -> Canary:
    after = canary.comparisons[kind].after(differences)
    return replace(canary, comparisons={**canary.comparisons, kind: after})


def _said(kind: Kind, comparison: Comparison) -> str:
    mean, seen = comparison.mean, comparison.seen
    if kind == "errors":
        return f"{mean:+.2%} of {seen} requests failed more"
    if kind == "latency":
        return f"{mean * _SLOW:+.1%} time between tokens in {seen} requests"
    if kind == "quality":
        return f"{mean * _NATS:+.4f} nats a token on {seen} texts"
    return f"{mean:+.3f} less liked in {seen} answers"
