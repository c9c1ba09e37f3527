"""Memory through which an engine and a host on another GPU of the same machine exchange rows.

Each lies on the GPU of who reads it, and is written from the other over NVLink or PCIe:

    inbox    the host's: a request, expert ids [T, K], weights [T, K], rows [T, H]
    outbox   the engine's: a flag, sums [T, H]
    bell     memory of the processors that the engine's GPU writes and the host's process watches: a request
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

from actors.buffers import Layout
from cluster.errors import HostError

_ALIGN: Final = 256
_BELL_BYTES: Final = 4096
# As Request in exchange.cu: words of 32 bits.
ASKED, LAYER, ROWS = 0, 1, 2


class Parts(NamedTuple):
    """Where things are in the two regions, in bytes, and how large these are."""

    ids: int
    weights: int
    x: int
    inbox: int
    y: int
    outbox: int

    @classmethod
    def of(cls, layout: Layout) -> Parts:
        """Of regions for `layout.max_rows` rows."""
        rows = layout.max_rows
        item: int = getattr(torch, layout.dtype).itemsize
        ids, weights = _ALIGN, _ALIGN + _padded(rows * layout.top_k * 4)
        x = weights + _padded(rows * layout.top_k * 4)
        row_bytes = _padded(rows * layout.hidden * item)
        return cls(ids, weights, x, x + row_bytes, _ALIGN, _ALIGN + row_bytes)


@dataclass(frozen=True, slots=True)
class Bell:
    """Shared memory of the processors, mapped."""

    memory: mmap.mmap
    words: np.ndarray
    """uint32."""

    @classmethod
    def made(cls) -> tuple[Bell, int]:
        """New memory that this process's GPU can write, and its descriptor, to be closed."""
        descriptor = os.memfd_create("expertmesh-bell", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _BELL_BYTES)
        bell = cls.mapped(descriptor)
        code = int(torch.cuda.cudart().cudaHostRegister(bell.address, _BELL_BYTES, 0))
        if code:
            os.close(descriptor)
            raise HostError(f"CUDA can't write memory of the host (cudaHostRegister: {code})")
        return bell, descriptor

    @classmethod
    def mapped(cls, descriptor: int) -> Bell:
        """The memory behind a descriptor, which may be closed then."""
        memory = mmap.mmap(descriptor, _BELL_BYTES)
        return cls(memory, np.frombuffer(memory, np.uint32))

    @property
    def address(self) -> int:
        """The same for the processors and a GPU that it is registered with."""
        return int(self.words.ctypes.data)

    def unregister(self) -> None:
        """The GPU writes it no more."""
        torch.cuda.cudart().cudaHostUnregister(self.address)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
