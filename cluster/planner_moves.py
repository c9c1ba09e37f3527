"""Which moves of all layers are made when there may only be so many: a pure function of the search's paths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def affordable(layers: Sequence[tuple[np.ndarray, np.ndarray, int]], limit: int | None) -> list[int]:
    """How many moves of each layer's path are made; all without a `limit`.

    Per layer: its path [N, 6], whose last column is the number of blobs to load after a move; the seconds gained by
    then [N]; and the blobs that it must load anyway, which count but are never refused. Moves of a layer build on
    each other, so prefixes are chosen: again and again the one with the most seconds per blob (Dantzig's rule).
    """
    if limit is None:
        return [len(path) for path, _, _ in layers]
    chosen = [0] * len(layers)
    loaded = [needed for _, _, needed in layers]
    left = limit - sum(loaded)
    queue: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        path, gains, _ = layers[number]
        first = chosen[number]
        if first >= len(path):
            return
        blobs = path[first:, 5] - loaded[number]
        gained = gains[first:] - (gains[first - 1] if first else 0.0)
        fits = np.flatnonzero(blobs <= left)
        if len(fits):
            # Moves that load nothing more are for nothing.
            rate = gained[fits] / np.maximum(blobs[fits], 0.5)
            best = int(np.argmax(rate))
            heapq.heappush(queue, (-float(rate[best]), number, first + int(fits[best]) + 1))

    for number in range(len(layers)):
        offer(number)
    while queue:
        _, number, length = heapq.heappop(queue)
        blobs = int(layers[number][0][length - 1, 5]) - loaded[number]
        if blobs <= left:
            left -= blobs
            loaded[number] += blobs
            chosen[number] = length
        elif left <= 0:
            continue
        offer(number)
    return chosen
