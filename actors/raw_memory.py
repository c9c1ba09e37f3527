"""Tensors' memory as memoryviews, found by address: what a small copy costs least with.

A tensor offers no buffer, and making NumPy's view of one takes longer than copying a row; a call of the C
library's memmove through ctypes takes twice as long as an assignment between two memoryviews. An engine's
allocator hands out the same few addresses step after step, so views are made once and kept.
"""

from __future__ import annotations

import ctypes

# Activations of some batch sizes times few addresses; more are forgotten all at once.
_MAX_KEPT = 4096


class RawMemory:
    """Views of memory that belongs to others. A view may be used only while its tensor lives.

    `kept` finds those made before, by (address, bytes).
    """

    def __init__(self, largest: int) -> None:
        self.kept: dict[tuple[int, int], memoryview] = {}
        # One type for all sizes: ctypes remembers every array type that was ever made.
        self._type = ctypes.c_ubyte * largest

    def view(self, address: int, size: int) -> memoryview:
        """The `size` bytes at `address`, at most `largest`, as a writable view of unsigned bytes."""
        view = self.kept.get((address, size))
        if view is None:
            if len(self.kept) >= _MAX_KEPT:
                self.kept.clear()
            view = memoryview(self._type.from_address(address)).cast("B")[:size]
            self.kept[address, size] = view
        return view
