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

# Ids of a layer that are kept before they are counted.
_KEPT: Final = 8192

_raw_memory = lru_cache(maxsize=256)(RawMemory)


@dataclass(slots=True)
class _Layer:
    counts: np.ndarray
    """int64 [E + 1]: by id + 1, since -1 wants no expert."""
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

    def __init__(self, experts: Mapping[int, int]) -> None:
        """`experts`: layer index → number of its experts."""
        self._layers = {layer: _Layer(np.zeros(number + 1, np.int64)) for layer, number in experts.items()}

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

    def take(self) -> dict[int, tuple[int, ...]]:
        """Per layer how often each expert was chosen since the last call."""
        taken = {}
        for layer, kept in self._layers.items():
            kept.fold()
            taken[layer] = tuple(kept.counts[1:].tolist())
            kept.counts[:] = 0
        return taken
