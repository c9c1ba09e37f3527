"""The payload's memory for one connection: four arrays at fixed offsets, allocated once.

On one node the memory is an anonymous file (memfd) whose descriptor the engine passes to the host
over the unix socket: it has no name, so nothing is left behind however a process ends. Between nodes
each side has private memory of the same layout.

Shape suffixes: R = capacity in rows, K = top-k, H = hidden size; n = rows of one dispatch.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cluster.frame import ITEM_BYTES

# Arrays start on cache lines, so that two processes never share one across arrays.
_ALIGN = 64
# One set of views per distinct row count; decode batches repeat few counts, prefill lengths vary.
_MAX_CACHED_VIEWS = 512


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that both ends of a connection agree on in the handshake."""

    max_rows: int
    hidden: int
    top_k: int
    dtype: str

    def offsets(self) -> tuple[int, int, int, int, int]:
        """Byte offsets of ids, weights, x, out, and the total size."""
        pair_bytes = _aligned(self.max_rows * self.top_k * 4)
        row_bytes = _aligned(self.max_rows * self.hidden * ITEM_BYTES[self.dtype])
        return 0, pair_bytes, 2 * pair_bytes, 2 * pair_bytes + row_bytes, 2 * (pair_bytes + row_bytes)


class Views(NamedTuple):
    """The arrays cut to n rows, as tensors (for kernels) and as raw memory (for copies and sockets).

    `x_raw` and `out_raw` are integer arrays of the rows' bytes: NumPy has no bfloat16, and a copy
    needs none. The `_bytes` are the same four, flat.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor
    out: torch.Tensor
    ids_np: np.ndarray
    weights_np: np.ndarray
    x_raw: np.ndarray
    out_raw: np.ndarray
    ids_bytes: memoryview
    weights_bytes: memoryview
    x_bytes: memoryview
    out_bytes: memoryview


class Buffers:
    """The four arrays of one connection: ids int32 [R, K], weights float32 [R, K], x and out dtype [R, H]."""

    def __init__(self, layout: Layout, memory: mmap.mmap, fd: int = -1) -> None:
        self.layout = layout
        self.fd = fd
        self._memory = memory
        R, K, H = layout.max_rows, layout.top_k, layout.hidden
        ids_at, weights_at, x_at, out_at, _ = layout.offsets()
        raw_type = np.int32 if ITEM_BYTES[layout.dtype] == 4 else np.int16
        self._ids_RK = np.frombuffer(memory, np.int32, R * K, ids_at).reshape(R, K)
        self._weights_RK = np.frombuffer(memory, np.float32, R * K, weights_at).reshape(R, K)
        self._x_RH = np.frombuffer(memory, raw_type, R * H, x_at).reshape(R, H)
        self._out_RH = np.frombuffer(memory, raw_type, R * H, out_at).reshape(R, H)
        self._views: dict[int, Views] = {}

    @classmethod
    def private(cls, layout: Layout) -> Buffers:
        """Memory of this process alone, for a TCP connection."""
        return cls(layout, mmap.mmap(-1, layout.offsets()[-1]))

    @classmethod
    def shared(cls, layout: Layout) -> Buffers:
        """A new memfd, kept open in `.fd` until the peer has it."""
        fd = os.memfd_create("expertmesh", os.MFD_CLOEXEC)
        os.ftruncate(fd, layout.offsets()[-1])
        return cls(layout, mmap.mmap(fd, layout.offsets()[-1]), fd)

    @classmethod
    def attached(cls, layout: Layout, fd: int) -> Buffers:
        """Map a peer's memfd; ValueError if it is smaller than the layout says."""
        size = layout.offsets()[-1]
        if os.fstat(fd).st_size < size:
            raise ValueError(f"shared memory of {os.fstat(fd).st_size} bytes, the layout needs {size}")
        return cls(layout, mmap.mmap(fd, size))

    def views(self, n: int) -> Views:
        """The arrays cut to `n` rows; kept, since making eight views costs more than a small dispatch."""
        views = self._views.get(n)
        if views is None:
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            dtype = getattr(torch, self.layout.dtype)
            ids, weights, x, out = self._ids_RK[:n], self._weights_RK[:n], self._x_RH[:n], self._out_RH[:n]
            views = self._views[n] = Views(
                torch.from_numpy(ids),
                torch.from_numpy(weights),
                torch.from_numpy(x).view(dtype),
                torch.from_numpy(out).view(dtype),
                ids,
                weights,
                x,
                out,
                *(array.reshape(-1).view(np.uint8).data for array in (ids, weights, x, out)),
            )
        return views

    def close_fd(self) -> None:
        """Close the descriptor; the mapping stays until the last view goes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
