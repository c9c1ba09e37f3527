"""A host's cost from measured times, and its correction by what is seen while it serves. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np

from cluster.fleet import HostCost

# A correction is a factor that follows the median of what was seen; within this nothing is worth a new plan.
_RATE: Final = 0.2
_MOST: Final = 8.0


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured dispatch."""

    rows: float
    """Pairs of row and expert."""
    experts: float
    """Distinct experts touched."""
    seconds: float


def fit(timings: Sequence[Timing]) -> HostCost:
    """The cost with the least squared relative errors, no part of it below zero.

    Relative, since a decode step of a millisecond and a prefill of a second are to be met equally well. Least squares
    over every subset of the three parts: of those without a negative part the best is the non-negative optimum.
    ValueError without a timing, or with one that took no time.
    """
    if not timings or min(timing.seconds for timing in timings) <= 0:
        raise ValueError("a cost needs timings, each longer than nothing")
    seconds = np.array([timing.seconds for timing in timings])
    parts = np.array([[1.0, timing.experts, timing.rows] for timing in timings]) / seconds[:, None]
    best, least = None, np.inf
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            if chosen == (0,):
                continue  # nothing takes the same time for no work and for much
            found, *_ = np.linalg.lstsq(parts[:, chosen], np.ones(len(seconds)), rcond=None)
            if found.min() < 0 or found[np.array(chosen) > 0].max() <= 0:
                continue
            error = float(((parts[:, chosen] @ found - 1.0) ** 2).sum())
            # A part that explains nothing is left out.
            if error < least * (1 - 1e-9):
                best, least = dict(zip(chosen, found.tolist(), strict=True)), error
    assert best is not None  # one positive part always fits positive times
    return HostCost(best.get(0, 0.0), best.get(1, 0.0), best.get(2, 0.0))


def fit_median(timings: Collection[Timing]) -> HostCost:
    """:func:`fit`, scaled so that half of the times are longer: of dispatches that had to wait for a core, least
    squares would take too much notice.
    """
    cost = fit(list(timings))
    ratio = float(np.median([t.seconds / cost.seconds(t.rows, t.experts) for t in timings]))
    return corrected(cost, ratio)


def median_error(cost: HostCost, timings: Sequence[Timing]) -> float:
    """Median of |predicted - measured| over measured."""
    errors = [abs(cost.seconds(t.rows, t.experts) - t.seconds) / t.seconds for t in timings]
    return float(np.median(errors))


def corrected(cost: HostCost, factor: float) -> HostCost:
    """The cost of a host that takes `factor` times as long as it did when it was measured."""
    return replace(
        cost,
        fixed_s=cost.fixed_s * factor,
        per_expert_s=cost.per_expert_s * factor,
        per_row_s=cost.per_row_s * factor,
    )


def next_factor(factor: float, cost: HostCost, seen: Sequence[Timing]) -> float:
    """The factor after further dispatches: a step towards the median of measured over predicted time.

    Bounded, so that a host that stood still for a moment is not written off, and a mistaken clock makes none free.
    """
    if not seen:
        return factor
    ratio = float(np.median([t.seconds / cost.seconds(t.rows, t.experts) for t in seen]))
    moved = factor ** (1 - _RATE) * max(ratio, 1 / _MOST) ** _RATE
    return float(min(_MOST, max(1 / _MOST, moved)))
