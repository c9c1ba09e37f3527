"""From a layer on a GPU to experts that are elsewhere, and back: kernels that a CUDA graph can hold, and who answers.

    memory of another GPU  ◀──┐     (experts that a neighbour has: `actors.gpu_neighbours`)          ┌──▶ added as well
    the engine's stream          post ──────────── experts at hand ──────────── collect
                                  │ rows, ids, weights, a flag                     ▲
    memory of the host            ▼                                                │ sums, a flag
    a thread of the engine       wait ─── the dispatcher, as on a CPU ─────────────┘

The stream never waits for Python, and what is elsewhere is computed while the GPU computes what is here. A dispatcher
that has not answered by the deadline is given up by `collect`, on the device: nothing that dies hangs the stream.

Shape suffixes as in `actors.dispatch`; E = experts of the layer.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import structlog
import torch

from actors.buffers import Layout
from actors.cuda_driver import kernel, launch
from actors.native_library import NATIVE, native_library

log = structlog.get_logger()

_SOURCE: Final = NATIVE / "exchange.cu"
# As the structs in exchange.cu: words of 32 bits.
_ASKED, _LAYER, _ROWS, _ANSWERED, _DEAD, _BOX_WORDS = 0, 1, 2, 32, 64, 96
_STATE_WORDS, _LATES = 16, 6
# As Neighbour in exchange.cu; and how many a word has bits for.
NEIGHBOUR: Final = np.dtype(
    [(name, np.uint64) for name in ("request", "ids", "weights", "x", "bell", "answered", "y")]
    + [("alive", np.uint32), ("wanted", np.uint32)]
)
MOST_NEIGHBOURS: Final = 8
_THREADS, _MOST_BLOCKS = 128, 128
# How long the thread watches for the next request with a core of its own, and then more lazily.
_SPIN_US = 2000

Compute = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Of layer, x [T, H], weights [T, K], ids [T, K], and the sums [T, H] to be written; all in the host's memory."""


class Mailbox(NamedTuple):
    """Addresses in memory that GPU and processors see."""

    asked: int
    """uint32, the number of the last request; written last."""
    answered: int
    """uint32, the number of the last answer; written last."""
    x: int
    y: int


class Exchange:
    """One engine's, used by all layers in turn."""

    def __init__(
        self, layout: Layout, device: int, deadline_s: float, *, near_deadline_s: float | None = None
    ) -> None:
        """`deadline_s`: after which rows go on without what is elsewhere, and `lates` counts one more.

        `near_deadline_s`: after which a neighbour is asked no more, and the mailbox instead; None if there are none.
        """
        self.layout, self.device = layout, device
        rows, top_k, hidden = layout.max_rows, layout.top_k, layout.hidden
        dtype: torch.dtype = getattr(torch, layout.dtype)
        self._deadline_ns = int(deadline_s * 1e9)
        self._bf16 = int(dtype == torch.bfloat16)
        self._vectors = hidden * dtype.itemsize // 16
        # Pinned memory has the same address on host and device.
        self._box = torch.zeros(_BOX_WORDS, dtype=torch.int32, pin_memory=True)
        self._ids = torch.full((rows, top_k), -1, dtype=torch.int32, pin_memory=True)
        self._weights = torch.zeros(rows, top_k, pin_memory=True)
        self._x = torch.zeros(rows, hidden, dtype=dtype, pin_memory=True)
        self._y = torch.zeros(rows, hidden, dtype=dtype, pin_memory=True)
        self._state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=f"cuda:{device}")
        self._places = torch.zeros(rows, top_k, dtype=torch.int32, device=f"cuda:{device}")
        self._local = torch.zeros(rows, top_k, device=f"cuda:{device}")
        self._bits = torch.zeros(rows, dtype=torch.int32, device=f"cuda:{device}")
        self._near_deadline_ns = None if near_deadline_s is None else int(near_deadline_s * 1e9)
        self._neighbours = torch.zeros(
            MOST_NEIGHBOURS * NEIGHBOUR.itemsize, dtype=torch.uint8, device=f"cuda:{device}"
        )
        self._last: tuple[Any, ...] = ()
        self._post = kernel(_SOURCE, "post", device)
        self._collect = kernel(_SOURCE, "collect", device)
        self._words = self._box.numpy().view(np.uint32)
        self._stop = np.zeros(1, np.uint32)
        self._thread: threading.Thread | None = None

    @property
    def _open_box(self) -> int:
        return self._box.data_ptr() if self._thread is not None else 0

    @property
    def _near(self) -> tuple[int, int]:
        """Where the neighbours are, and how many there may be."""
        return (0, 0) if self._near_deadline_ns is None else (self._neighbours.data_ptr(), MOST_NEIGHBOURS)

    @property
    def lates(self) -> int:
        """Layers that went on without an answer; waits for the device."""
        return int(self._state[_LATES])

    def post(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        place_E: torch.Tensor,
        near_E: torch.Tensor,
        counts_E: torch.Tensor,
        nothing: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send off what is elsewhere; the places [T, K] and weights [T, K] of what is here, valid until the next call.

        `place_E` int32: where each expert is here, or -1; `near_E` int32: the neighbour to ask for it, or -1, which
        comes first. Pairs that are not computed here get the place `nothing` and the weight 0. `counts_E` int64
        counts what was chosen.
        """
        rows, top_k = ids_TK.shape
        values = (
            *map(_address, (x_TH, ids_TK, weights_TK, place_E, near_E)), nothing,
            *map(_address, (self._places, self._local, self._bits, counts_E)), self._open_box,
            *map(_address, (self._ids, self._weights, self._x)), *self._near, self._state.data_ptr(),
            rows, top_k, self._vectors, layer, len(place_E),
        )  # fmt: skip
        launch(self._post, min(rows, _MOST_BLOCKS), _THREADS, values, _POST_TYPES)
        self._last = x_TH, ids_TK, weights_TK, near_E, layer
        return self._places[:rows], self._local[:rows]

    def collect(self, y_TH: torch.Tensor) -> None:
        """Add to the sums of what is here what was sent off by the last `post`."""
        if not self._open_box:
            return
        x_TH, ids_TK, weights_TK, near_E, layer = self._last
        values = (
            *map(_address, (y_TH, self._bits, x_TH, ids_TK, weights_TK, near_E)), *self._near,
            *map(_address, (self._box, self._ids, self._weights, self._x, self._y)),
            self._box.data_ptr() + 4 * _DEAD, self._state.data_ptr(), len(y_TH), self.layout.top_k, self._vectors,
            layer, len(near_E), self._bf16, self._deadline_ns, self._near_deadline_ns or 0,
        )  # fmt: skip
        launch(self._collect, min(len(y_TH), _MOST_BLOCKS), _THREADS, values, _COLLECT_TYPES)

    def set_neighbour(self, number: int, row: dict[str, int] | None) -> None:
        """Have a neighbour (fields of NEIGHBOUR), or none, from the next step on. No work may be under way."""
        entry = np.zeros(1, NEIGHBOUR)
        for name, value in (row or {}).items():
            entry[name] = value
        entry["alive"] = row is not None
        size = NEIGHBOUR.itemsize
        self._neighbours[number * size : (number + 1) * size].copy_(torch.from_numpy(entry.view(np.uint8)))
        self._words[_DEAD] &= ~np.uint32(2 << number)

    @property
    def dead(self) -> list[int]:
        """Neighbours that did not answer in time since they were set."""
        bits = int(self._words[_DEAD])
        return [number for number in range(MOST_NEIGHBOURS) if bits & 2 << number]

    def serve(self, compute: Compute) -> None:
        """Have `compute` answer, in a thread, until `close`. What it raises is logged, and the sums are then zeros."""
        library = native_library("doorbell", NATIVE / "doorbell.cpp", ("-O2",))
        wait = library.expertmesh_wait
        wait.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64]
        wait.restype = ctypes.c_uint32
        self.answered_by(partial(self._answer, wait, compute))

    def answered_by(self, run: Callable[[], None]) -> None:
        """Have a thread that runs this answer what is posted, see `mailbox`."""
        self._thread = threading.Thread(target=run, name="expertmesh-exchange", daemon=True)
        self._thread.start()

    @property
    def mailbox(self) -> Mailbox:
        """Where requests and answers are."""
        flags = self._box.data_ptr()
        return Mailbox(flags + 4 * _ASKED, flags + 4 * _ANSWERED, self._x.data_ptr(), self._y.data_ptr())

    def close(self) -> None:
        """Answer no more. No work that posts may be under way."""
        self._stop[0] = 1
        if self._thread is not None:
            self._thread.join(5.0)

    def _answer(self, wait: Any, compute: Compute) -> None:
        words, seen = self._words, int(self._words[_ANSWERED])
        asked, stop = self._box.data_ptr(), self._stop.ctypes.data
        while True:
            number = wait(asked, seen, stop, _SPIN_US)
            if number == seen:
                return
            rows, layer = int(words[_ROWS]), int(words[_LAYER])
            try:
                compute(layer, self._x[:rows], self._weights[:rows], self._ids[:rows], self._y[:rows])
            except Exception:
                # Whatever it was, the stream waits for a flag.
                log.exception("dispatch failed", layer=layer, rows=rows)
                self._y[:rows].zero_()
            # As `post` expects them.
            self._ids[:rows].fill_(-1)
            words[_ANSWERED] = seen = number


_P, _I, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
_POST_TYPES: Final = (*(_P,) * 5, _I, *(_P,) * 9, _I, _P, *(_I,) * 5)
_COLLECT_TYPES: Final = (*(_P,) * 7, _I, *(_P,) * 7, *(_I,) * 6, _U64, _U64)


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()
