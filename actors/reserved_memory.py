"""Memory for weights that may come later: address space costs nothing until it is written to."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Final

import torch

# Linux's numbers, which Python 3.11 does not name.
_MAP_NORESERVE: Final = 0x4000
_MADV_DONTNEED: Final = 4
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def reserved(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros whose pages are taken when they are first written. OSError where the kernel grants no room.

    MAP_NORESERVE: a host reserves its whole model, of which it may hold a small part.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def release(part: torch.Tensor) -> None:
    """Give the pages of a contiguous part of a reserved tensor back; it reads as zeros then.

    Pages that it shares with its neighbours stay. OSError if the kernel refuses.
    """
    first = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and _madvise(first, last - first, _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "pages can't be given back")
