"""Which experts the router chose, counted as rows pass by: one copy of a few bytes per dispatch.

Ids are kept as they came, per layer, and counted only when the room for them is used up or somebody asks: counting two
numbers costs as much as counting thousands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
import torch

from actors.raw_memory import RawMemory
from cluster.live_versions import Added

# Ids of a layer that are kept before they are counted.
_KEPT: Final = 8192

_raw_memory = lru_cache(maxsize=256)(RawMemory)


@dataclass(slots=True)
class _Layer:
    counts: np.ndarray
    """int64 [E + S + 1]: by id + 1, since -1 wants no expert."""
    size: int
    """E."""
    ids: np.ndarray = field(default_factory=lambda: np.empty(_KEPT, np.int32))
    memory: memoryview = field(init=False)
    used: int = 0

    def __post_init__(self) -> None:
        self.memory = self.ids.data.cast("B")

    def count(self, ids: np.ndarray) -> None:
        self.counts += np.bincount(ids + 1, minlength=len(self.counts))

    def fold(self) -> None:
        self.count(self.ids[: self.used])
        self.used = 0


class RoutingCounts:
    """Of one engine process; used by the thread that steps."""

    def __init__(self, experts: Mapping[int, int], spare: int = 0) -> None:
        """`experts`: layer index → number of its experts E, `spare` as many as a version may add, S."""
        self._layers = {
            layer: _Layer(np.zeros(number + spare + 1, np.int64), number) for layer, number in experts.items()
        }

    def note(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Rows with these experts, contiguous int32 [T, K] of the layer's own, pass by."""
        kept = self._layers[layer]
        size = ids_TK.nbytes
        pairs, start = size >> 2, kept.used
        end = start + pairs
        if end > _KEPT:
            kept.fold()
            if pairs > _KEPT:
                kept.count(ids_TK.numpy().reshape(-1))
                return
            start, end = 0, pairs
        kept.memory[start << 2 : end << 2] = _raw_memory(size)[ids_TK.data_ptr()]
        kept.used = end

    def take(self, added: Added | None = None) -> dict[int, tuple[int, ...]]:
        """Per layer how often each expert was chosen since the last call; those that were added count for the ones
        beside which they live.
        """
        taken = {}
        for layer, kept in self._layers.items():
            kept.fold()
            counts = kept.counts[1:]
            for expert, beside in (added or {}).get(layer, {}).items():
                counts[beside] += counts[expert]
            taken[layer] = tuple(counts[: kept.size].tolist())
            kept.counts[:] = 0
        return taken
