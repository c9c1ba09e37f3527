"""One layer's experts in a host, and from the model's expert numbers to the host's slots."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from cluster.errors import HostError

# slot_of's mark for an expert of the layer that this host does not hold.
_ABSENT = -2
# ndarray.min goes through two Python frames; the ufunc's own reduction does not.
_minimum, _maximum = np.minimum.reduce, np.maximum.reduce
# Up to here Python's max over a list is faster than a reduction of numpy's.
_FEW = 32


class Experts(Protocol):
    """One layer's local experts; see `actors.expert_kernels`."""

    def compute(
        self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None: ...


class HostedLayer:
    """A layer's experts and the map from the model's expert numbers to the host's slots."""

    def __init__(self, experts: Experts, expert_ids: tuple[int, ...], num_experts: int) -> None:
        self.experts = experts
        # slot_of[-1] is the last element: ids of -1 ("not for this host") stay -1 without a branch.
        self.slot_of = np.full(num_experts + 1, _ABSENT, np.int32)
        self.slot_of[list(expert_ids)] = np.arange(len(expert_ids), dtype=np.int32)
        self.slot_of[-1] = -1
        # Ids below this are their own slots: all of the layer's where one host holds it whole.
        self.same_below = num_experts if expert_ids == tuple(range(num_experts)) else 0

    def to_slots(self, ids: np.ndarray, slots: Slots) -> None:
        """Write the slot of every id in the host's own memory, where the engine can't change it any more.

        Raises IndexError for an id outside the layer, HostError for an expert that lives elsewhere.
        """
        if self.same_below and slots.numbers:
            slots.array[...] = ids
            # As unsigned numbers, so that -1 is large too and one comparison finds both.
            unsigned = slots.unsigned
            if (max(unsigned.tolist()) if slots.numbers <= _FEW else _maximum(unsigned)) < self.same_below:
                return
        self.slot_of.take(ids, out=slots.array)
        if slots.numbers and _minimum(slots.array, None) == _ABSENT:
            missing = sorted(set(ids[slots.array == _ABSENT].tolist()))
            raise HostError(f"does not hold experts {missing}")


class Slots(NamedTuple):
    """A connection's slots cut to the n rows of one message, and the same memory in other views."""

    array: np.ndarray
    """int32 [n, K]."""
    unsigned: np.ndarray
    """uint32 [n·K]."""
    tensor: torch.Tensor
    numbers: int
    """n·K."""

    @classmethod
    def of(cls, array: np.ndarray) -> Slots:
        return cls(array, array.reshape(-1).view(np.uint32), torch.from_numpy(array), array.size)
