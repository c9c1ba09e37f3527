"""How many rows an expert takes in one step, and which pairs of row and expert are beyond that. Pure functions.

    base     = max(min_rows, factor · rows · top_k / experts)
    load     = rows / rows of the largest step
    capacity = ceil(base · (1 + coefficient · load))

`factor` is the capacity factor of GShard (arXiv:2006.16668) and of Switch Transformers (arXiv:2101.03961), `min_rows`
what DeepSpeed calls min_capacity: in a small step an expert costs its bytes, however many rows it gets. The
coefficient gives large steps more room, and is adapted to the skew of the traffic (`adapt`).

Shape suffixes: T = rows of the step, K = top-k.
"""

from __future__ import annotations

import math

import numpy as np

from cluster.messages import CapacitySettings

# See `adapt`: below 2 it converges, up to 1 without overshoot.
_RATE = 0.5
# A share of the largest step: what a deferred step may still take at least, and by how much the next one grows.
_LEAST, _GROWTH = 8, 8


def load(rows: int, largest: int) -> float:
    """How full a step is, 0 to 1; `largest` is the most rows that a step may have."""
    return min(rows / largest, 1.0)


def capacity(
    settings: CapacitySettings, coefficient: float, *, rows: int, top_k: int, experts: int, largest: int
) -> int:
    """Rows that one expert takes in a step of so many; see above."""
    base = max(settings.min_rows, settings.factor * rows * top_k / experts)
    # Less than a rounding error above a whole number is that number.
    return math.ceil(base * (1 + coefficient * load(rows, largest)) * (1 - 1e-12))


def adapt(settings: CapacitySettings, coefficient: float, load: float, share: float) -> float:
    """The coefficient after a step of this load, in which this share of its pairs overflowed.

    An integral controller, c + rate · load · (share − target), within the bounds. The share falls by at most `load`
    for each 1 that the coefficient rises: with n experts over a capacity C their pairs, n · C, are at most all of
    the step's, and dC/dc is C · load / (1 + c · load). A rate of 0.5 thus undoes at most half of a step's distance,
    so that the same routing again and again leads to the target from one side. Weighing by the load keeps small
    steps, in which the coefficient changes nothing, from driving it to a bound.
    """
    moved = coefficient + _RATE * load * (share - settings.target)
    return min(max(moved, settings.coefficient_min), settings.coefficient_max)


def overflow(ids_TK: np.ndarray, weights_TK: np.ndarray, capacity: int, experts: int) -> np.ndarray:
    """bool [T, K]: the pairs that their experts have no room for; an id of -1 wants no expert.

    Of each expert's pairs those with the smallest routing weights; of equal ones the later rows.
    """
    ids, weights = ids_TK.ravel(), weights_TK.ravel()
    over = np.zeros(ids.size, bool)
    if len(ids_TK) <= capacity:
        # A row wants an expert once.
        return over.reshape(ids_TK.shape)
    wanted = ids >= 0
    full = np.bincount(ids[wanted], minlength=experts) > capacity
    if full.any():
        pairs = np.flatnonzero(wanted & full[ids])
        over[pairs] = ~within(ids[pairs], weights[pairs], np.full(experts, capacity))
    return over.reshape(ids_TK.shape)


def within(ids: np.ndarray, weights: np.ndarray, room: np.ndarray) -> np.ndarray:
    """bool [N]: the pairs that are taken if each expert has room [E] for so many, the heaviest first."""
    order = np.lexsort((-weights, ids))
    in_order = ids[order]
    place = np.arange(ids.size) - np.searchsorted(in_order, in_order)
    taken = np.empty(ids.size, bool)
    taken[order] = place < room[in_order]
    return taken


def drop(ids_TK: np.ndarray, weights_TK: np.ndarray, over_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights without these pairs: -1 and 0; a row's others are scaled to the sum that the row had.

    A row that loses all of them gets nothing from its routed experts.
    """
    kept = np.where(over_TK, 0, weights_TK)
    left = kept.sum(axis=1)
    scale = np.divide(weights_TK.sum(axis=1), left, out=np.zeros_like(left), where=left > 0)
    # Rows that lose nothing keep their bits.
    scale[~over_TK.any(axis=1)] = 1
    return np.where(over_TK, -1, ids_TK).astype(np.int32), (kept * scale[:, None]).astype(np.float32)


def token_budget(
    budget: int, largest: int, *, scheduled: int, running: int, share: float, target: float
) -> int:
    """Tokens that the next step may take, for the policy `defer`.

    After a step of `scheduled` tokens in which more than `target` of the pairs overflowed, it is less by that share;
    else an eighth of the largest step more than it was. Never less than an eighth of the largest step, nor than a
    token for each running request: such a step is no overload.
    """
    if share > target:
        budget = int(min(budget, scheduled) * (1 - share))
    else:
        budget += -(-largest // _GROWTH)
    return min(max(budget, running, -(-largest // _LEAST)), largest)
