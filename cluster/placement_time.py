"""How long a layer's placement takes: the slowest host after the best split, over the scenarios of its load.

Arrays as in `cluster.placement_moves`. Compiled by Numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cluster.balance import even, pour

# The maximum alone gives a search no direction while several hosts are the slowest.
_REST = 0.3
_SWEEPS, _FEW = 100, 4096


@njit(cache=True, nogil=True)
def objective(level):
    """What a search makes least, of one scenario's levels [H]: the longest, and in part the others (4th powers)."""
    longest = rest = 0.0
    for h in range(len(level)):
        longest = max(longest, level[h])
        squared = level[h] * level[h]
        rest += squared * squared
    return longest + _REST * np.sqrt(np.sqrt(rest / len(level)))


@njit(cache=True, nogil=True)
def level_objective(touch, rows, fixed, per_touch, per_row):
    """The objective if every host held every expert and took the same share of each: as good as placements need be."""
    weight = held = 0.0
    for h in range(len(fixed)):
        cost = 0.0
        for e in range(len(rows)):
            cost += per_touch[h] * touch[e] + per_row[h] * rows[e]
        if cost <= 0.0:
            return 0.0
        weight += 1.0 / cost
        held += fixed[h] / cost
    level = (1.0 + held) / weight
    return (1.0 + _REST) * level


@njit(cache=True, nogil=True)
def step_seconds(holders, copies, touch, rows, fixed, per_touch, per_row):
    """Seconds of the slowest host under the best split, averaged over the scenarios."""
    hosts = len(fixed)
    share, level = np.zeros((len(copies), holders.shape[1])), np.zeros(hosts)
    # Of thousands of copies every sweep levels nearly all hosts, and takes its time.
    sweeps = max(_SWEEPS // 10, min(_SWEEPS, _SWEEPS * _FEW // max(1, copies.sum())))
    total = 0.0
    for s in range(touch.shape[0]):
        even(holders, copies, touch[s], rows[s], fixed, per_touch, per_row, share, level)
        pour(holders, copies, touch[s], rows[s], per_touch, per_row, share, level, 1e-5 * level.max(), sweeps)
        total += level.max()
    return total / touch.shape[0]
