"""Overflow rerouted: which other experts take the pairs that their own has no room for. A pure function.

Shape suffixes: R = rows, E = experts, K = top-k.
"""

from __future__ import annotations

import numpy as np

from cluster.capacity import within
from cluster.gate import NEVER


def next_choices(
    ids_RK: np.ndarray,
    weights_RK: np.ndarray,
    over_RK: np.ndarray,
    preferences_RE: np.ndarray,
    room_E: np.ndarray,
) -> np.ndarray:
    """int32 [R, K]: the ids, those of overflowing pairs replaced; -1 where no expert of the row's has room.

    An expert is taken by no row twice, and by no more rows than it has room for. In rounds: the heaviest pair of
    each row that waits asks for the expert that the row prefers among those with room, and each expert takes the
    heaviest that ask. A round fills an expert up or takes all that ask, so there are few.
    """
    ids, waiting, room = ids_RK.astype(np.int32), over_RK.copy(), np.maximum(room_E, 0)
    open_RE = preferences_RE.copy()
    np.put_along_axis(open_RE, ids_RK.astype(np.int64), NEVER, axis=1)
    ids[waiting] = -1
    while True:
        open_RE[:, room <= 0] = NEVER
        rows = np.flatnonzero(waiting.any(axis=1))
        slots = np.where(waiting[rows], weights_RK[rows], -np.inf).argmax(axis=1)
        wanted = open_RE[rows].argmax(axis=1)
        possible = open_RE[rows, wanted] != NEVER
        waiting[rows[~possible]] = False
        rows, slots, wanted = rows[possible], slots[possible], wanted[possible]
        if not rows.size:
            return ids
        taken = within(wanted, weights_RK[rows, slots], room)
        rows, slots, wanted = rows[taken], slots[taken], wanted[taken]
        ids[rows, slots] = wanted
        waiting[rows, slots] = False
        open_RE[rows, wanted] = NEVER
        room = room - np.bincount(wanted, minlength=room.size)
