"""Tensors' memory as memoryviews, found by address: what a small copy costs least with.

A tensor offers no buffer, and making NumPy's view of one takes longer than copying a row; a call of the C
library's memmove through ctypes takes twice as long as an assignment between two memoryviews. An engine's
allocator hands out the same few addresses step after step, so views are made once and kept.
"""

from __future__ import annotations

import ctypes

# Views of one size; more are forgotten all at once.
_MAX_KEPT = 256
# One type for all sizes, since ctypes remembers every array type that was ever made. Nothing reads past a
# view's own size.
_Memory = ctypes.c_ubyte * (1 << 40)


class RawMemory(dict[int, memoryview]):
    """Address → the `size` bytes there, as a writable view of unsigned bytes; made when first asked for.

    The memory belongs to others: a view may be used only while its tensor lives.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __missing__(self, address: int) -> memoryview:
        if len(self) >= _MAX_KEPT:
            self.clear()
        view = self[address] = memoryview(_Memory.from_address(address)).cast("B")[: self._size]
        return view
