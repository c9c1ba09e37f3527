"""One layer's experts in a host, and from the model's expert numbers to the host's slots."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from actors.expert_kernels import LayerExperts
from cluster.errors import HostError

# slot_of's mark for an expert of the layer that this host does not hold.
_ABSENT = -2
_ONE = np.uint32(1)
# -1, "not for this host", as an unsigned number.
_UNSIGNED_NONE = 0xFFFFFFFF
# ndarray.min goes through two Python frames; the ufunc's own reduction does not.
_minimum, _maximum = np.minimum.reduce, np.maximum.reduce
# Up to so many numbers Python's max is faster than a reduction of numpy's.
FEW = 32


class HostedLayer:
    """A layer's experts and the map from their numbers (see `cluster.live_versions`) to the host's slots."""

    def __init__(
        self, experts: LayerExperts, held: Sequence[int] | Mapping[int, int], num_experts: int
    ) -> None:
        """`held`: the experts in the order of their slots, or each one's slot.

        `num_experts`: of the base checkpoint.
        """
        slots = held if isinstance(held, Mapping) else {expert: slot for slot, expert in enumerate(held)}
        self.experts = experts
        self.slots = dict(slots)
        self.compute = experts.compute
        self.num_experts = num_experts
        # By id + 1 as an unsigned number: -1 ("not for this host") comes first, and no other id wraps around.
        self.slot_of = np.full(max(num_experts, 1 + max(slots, default=0)) + 1, _ABSENT, np.int32)
        for expert, slot in slots.items():
            self.slot_of[expert + 1] = slot
        self.slot_of[0] = -1
        # The same for few ids, as unsigned numbers, without NumPy.
        self.slot_by_id = {**slots, _UNSIGNED_NONE: _UNSIGNED_NONE}
        # Ids below this, as unsigned numbers, are their own slots: all of the base checkpoint's where this host has
        # those. -1 is a large unsigned number, so that one comparison finds whatever else there may be.
        same = all(slots.get(expert) == expert for expert in range(num_experts))
        self.same_below = num_experts if same else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are held."""
        return self.experts.weight_bytes // max(1, self.experts.room) * len(self.slots)

    def to_slots(self, ids: Ids, slots: Ids) -> None:
        """Write the slot of every id into `slots`: memory of the host's own, that no engine can change any more.

        Raises IndexError for an id outside the layer, HostError for an expert that lives elsewhere.
        """
        if not slots.words:
            return
        slots.words[:] = ids.words
        unsigned = slots.unsigned
        if len(unsigned) <= FEW:
            try:
                slots.words[:] = array("I", [self.slot_by_id[word] for word in slots.words])
                return
            except KeyError:
                pass  # the way below finds the right words for it
        elif self.same_below and _maximum(unsigned) < self.same_below:
            return
        np.add(unsigned, _ONE, out=unsigned)
        # Not in place: take makes indices of its own of the numbers, and with mode="raise" a result of its own.
        self.slot_of.take(unsigned, out=slots.array.reshape(-1))
        if _minimum(slots.array, None) == _ABSENT:
            missing = sorted(set(ids.array[slots.array == _ABSENT].tolist()))
            raise HostError(f"does not hold experts {missing}")


class Ids(NamedTuple):
    """Expert ids, or the slots made of them, of one message's n rows: the same memory in several views.

    NumPy's first operation after a wait costs microseconds, that of a memoryview a fraction of one.
    """

    array: np.ndarray
    """int32 [n, K]."""
    words: memoryview
    """uint32 [n·K]."""
    unsigned: np.ndarray
    """uint32 [n·K]."""
    tensor: torch.Tensor

    @classmethod
    def of(cls, matrix: np.ndarray) -> Ids:
        unsigned = matrix.reshape(-1).view(np.uint32)
        return cls(matrix, unsigned.data, unsigned, torch.from_numpy(matrix))
