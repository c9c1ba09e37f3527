"""Which replica answers how much: the split of experts' loads that lets the slowest host finish earliest.

An expert's time on a host is what it would take if all its rows went there; a share of the rows takes that share of
the time. Experts are poured over their hosts one after the other, each to one level (a closed form), again and again,
until nothing moves: block coordinate descent on the sum of squared host times. With times that differ between hosts
by one factor per host this also minimises the longest of them, since both are least for the same, least majorised
loads (Fujishige, "Lexicographically optimal base of a polymatroid", 1980); otherwise it comes close.

Compiled by Numba. Dimensions: S = scenarios, E = experts, M = most copies of an expert, H = hosts.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def pour(holders, copies, touch, rows, per_touch, per_row, share, level, tolerance, sweeps):
    """Level one layer's hosts in one scenario, from the shares there are.

    Args: holders int32 [E, M], copies int32 [E]; touch and rows [E]: how often an expert is asked and with how many
    rows, in a step; per_touch and per_row [H] seconds of each; share [E, M] of each expert's load, sums to 1, and
    level [H] seconds of each host, both updated. Ends once a sweep over all experts moves less than `tolerance`
    seconds in all, or after `sweeps` of them. Returns the number of sweeps.
    """
    for sweep in range(sweeps):
        moved = 0.0
        for e in range(holders.shape[0]):
            if copies[e] > 1:
                moved += _pour_one(e, holders, copies, touch, rows, per_touch, per_row, share, level)
        if moved < tolerance:
            return sweep + 1
    return sweeps


@njit(cache=True, nogil=True)
def pour_these(
    experts, number, holders, copies, touch, rows, per_touch, per_row, share, level, tolerance, sweeps
):
    """`pour` of the first `number` of these experts: those with copies to choose from, if they are known."""
    for sweep in range(sweeps):
        moved = 0.0
        for at in range(number):
            if copies[experts[at]] > 1:
                moved += _pour_one(
                    experts[at], holders, copies, touch, rows, per_touch, per_row, share, level
                )
        if moved < tolerance:
            return sweep + 1
    return sweeps


@njit(cache=True, nogil=True)
def _pour_one(e, holders, copies, touch, rows, per_touch, per_row, share, level):
    """Level the hosts of one expert with several copies; the seconds that were moved."""
    if touch[e] <= 0.0 and rows[e] <= 0.0:
        return 0.0
    if copies[e] > 2:
        return _pour_many(e, copies[e], holders, touch, rows, per_touch, per_row, share, level)
    a, b = holders[e, 0], holders[e, 1]
    cost_a = per_touch[a] * touch[e] + per_row[a] * rows[e]
    cost_b = per_touch[b] * touch[e] + per_row[b] * rows[e]
    old = share[e, 0]
    without_a = level[a] - old * cost_a
    without_b = level[b] - share[e, 1] * cost_b
    # without_a + x cost_a = without_b + (1 - x) cost_b
    new = (without_b + cost_b - without_a) / (cost_a + cost_b)
    new = min(1.0, max(0.0, new))
    share[e, 0], share[e, 1] = new, 1.0 - new
    level[a] = without_a + new * cost_a
    level[b] = without_b + (1.0 - new) * cost_b
    return abs(new - old) * cost_a


@njit(cache=True, nogil=True)
def _pour_many(e, n, holders, touch, rows, per_touch, per_row, share, level):
    """One expert over three hosts or more: those whose level is lowest are filled up to a common one."""
    for j in range(n):
        h = holders[e, j]
        level[h] -= share[e, j] * (per_touch[h] * touch[e] + per_row[h] * rows[e])
    # The common level solves the sum over the hosts below it of (top - level) / cost = 1. With all hosts it is too
    # high or right; without those above it, it falls, until nobody is above it any more.
    top = np.inf
    while True:
        weight = held = 0.0
        for j in range(n):
            h = holders[e, j]
            if level[h] <= top:
                inverse = 1.0 / (per_touch[h] * touch[e] + per_row[h] * rows[e])
                weight += inverse
                held += level[h] * inverse
        # Rounded, the level of a tiny load may be below everybody's.
        if weight == 0.0 or (1.0 + held) / weight >= top:
            break
        top = (1.0 + held) / weight
    filled = 0.0
    for j in range(n):
        h = holders[e, j]
        filled += max(0.0, top - level[h]) / (per_touch[h] * touch[e] + per_row[h] * rows[e])
    moved = 0.0
    for j in range(n):
        h = holders[e, j]
        cost = per_touch[h] * touch[e] + per_row[h] * rows[e]
        new = max(0.0, top - level[h]) / (cost * filled) if filled > 0.0 else 1.0 / n
        moved += abs(new - share[e, j]) * cost
        share[e, j] = new
        level[h] += new * cost
    return moved


@njit(cache=True, nogil=True)
def levels(holders, copies, touch, rows, fixed, per_touch, per_row, share, level):
    """The hosts' levels that given shares of a load make on top of `fixed` [H] seconds; overwritten."""
    level[:] = fixed
    for e in range(holders.shape[0]):
        for j in range(copies[e]):
            h = holders[e, j]
            level[h] += share[e, j] * (per_touch[h] * touch[e] + per_row[h] * rows[e])


@njit(cache=True, nogil=True)
def even(holders, copies, touch, rows, fixed, per_touch, per_row, share, level):
    """Equal shares of every expert, and the hosts' levels that they make; both are overwritten."""
    for e in range(holders.shape[0]):
        share[e, : copies[e]] = 1.0 / max(1, copies[e])
    levels(holders, copies, touch, rows, fixed, per_touch, per_row, share, level)


@njit(cache=True, nogil=True)
def resume(holders, copies, touch, rows, fixed, per_touch, per_row, share, level, tolerance, sweeps):
    """Level the hosts for another load from the shares that there are; `tolerance` is a share of all hosts' time."""
    levels(holders, copies, touch, rows, fixed, per_touch, per_row, share, level)
    return pour(
        holders, copies, touch, rows, per_touch, per_row, share, level, tolerance * level.sum(), sweeps
    )
