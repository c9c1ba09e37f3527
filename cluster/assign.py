"""Which replica answers which rows of the step at hand, so that the slowest host is done early.

Of few rows an expert goes to one host as a whole: what its weights cost to read is paid once. Of many rows an expert's
are divided, in the shares that level the hosts (`cluster.balance`): there, reading is cheap beside computing.

Compiled by Numba, some microseconds a call. Dimensions: P = pairs of row and expert, E = experts, M = most copies of an
expert, H = hosts.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cluster.balance import even, pour

_SWEEPS = 4


@njit(cache=True, nogil=True)
def count(ids, rows):
    """rows float64 [E]: how many of the ids int32 [P] are each expert's; -1 wants none.

    Returns how many experts have any, -1 if an id is past the last one.
    """
    rows[:] = 0.0
    active = 0
    for expert in ids:
        if expert >= len(rows):
            return -1
        if expert >= 0:
            if rows[expert] == 0.0:
                active += 1
            rows[expert] += 1.0
    return active


@njit(cache=True, nogil=True)
def whole(rows, holders, copies, fixed, per_touch, per_row, level, order, owner):
    """Every expert to one of its hosts: those with one holder first, then the largest first, each to where it ends
    earliest (list scheduling by longest processing time; Graham, 1969).

    Args: rows [E]; holders int32 [E, M] and copies int32 [E]; fixed, per_touch and per_row [H] seconds; level [H]
    and order int32 [E] are room to work in. Writes owner int16 [E]: of experts nobody asks for the first holder, of
    those without one -1. Returns the latest host's end in seconds.
    """
    level[:] = fixed
    waiting = 0
    for e in range(len(rows)):
        if copies[e] == 0:
            owner[e] = -1
        elif copies[e] == 1 or rows[e] == 0.0:
            h = holders[e, 0]
            owner[e] = h
            if rows[e] > 0.0:
                level[h] += per_touch[h] + per_row[h] * rows[e]
        else:
            # Insertion: of a step's few experts this is the shortest sort.
            at = waiting
            while at > 0 and rows[order[at - 1]] < rows[e]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = e
            waiting += 1
    for at in range(waiting):
        e = order[at]
        best, end = -1, np.inf
        for j in range(copies[e]):
            h = holders[e, j]
            then = level[h] + per_touch[h] + per_row[h] * rows[e]
            if then < end:
                best, end = h, then
        owner[e] = best
        level[best] = end
    latest = 0.0
    for h in range(len(level)):
        if level[h] > latest:
            latest = level[h]
    return latest


@njit(cache=True, nogil=True)
def divided(ids, rows, holders, copies, fixed, per_touch, per_row, share, level, touch, passed, hosts):
    """Experts' rows over all their hosts: writes hosts int16 [P], who answers each pair, -1 if nobody.

    `share` [E, M] is kept from step to step, or begun evenly where it adds up to nothing; touch and passed [E] and
    level [H] are room to work in.
    """
    experts = len(rows)
    for e in range(experts):
        touch[e] = min(1.0, rows[e])
    if share[:, 0].sum() == 0.0:
        even(holders, copies, touch, rows, fixed, per_touch, per_row, share, level)
    level[:] = fixed
    for e in range(experts):
        for j in range(copies[e]):
            h = holders[e, j]
            level[h] += share[e, j] * (per_touch[h] * touch[e] + per_row[h] * rows[e])
    pour(holders, copies, touch, rows, per_touch, per_row, share, level, 1e-3 * level.sum(), _SWEEPS)
    passed[:] = 0.0
    for p in range(len(ids)):
        e = ids[p]
        if e < 0 or e >= experts or copies[e] == 0:
            hosts[p] = -1
            continue
        # The middle of this row's place among the expert's rows, as a share of them.
        place = (passed[e] + 0.5) / rows[e]
        passed[e] += 1.0
        j, reached = 0, share[e, 0]
        while j < copies[e] - 1 and place > reached:
            j += 1
            reached += share[e, j]
        hosts[p] = holders[e, j]


def warm() -> None:
    """Load the compiled code, or compile it, before a step waits for it."""
    ids, holders, copies = np.zeros(1, np.int32), np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    rows, one, share = np.zeros(1), np.ones(1), np.zeros((1, 1))
    count(ids, rows)
    whole(
        rows, holders, copies, one, one, one, np.zeros(1), np.zeros(1, np.int32), np.zeros(2, np.int16)[:-1]
    )
    divided(
        ids, rows, holders, copies, one, one, one, share, np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1, np.int16)
    )  # fmt: skip
