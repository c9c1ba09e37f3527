"""Where a GPU host answers an engine on another GPU of its machine: graphs, launched as soon as a request is there.

    receive (the request, experts' places) → the layer's experts → give (sums into the engine's memory, a flag)

A thread watches the bell and launches. After each request it launches those that will probably follow, of the next
layers with as many rows: they wait on the device for a moment, so that a step's layers wait for no launch. What was
guessed wrongly, or too early, computes nothing. The other side is `actors.gpu_neighbours`.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import structlog
import torch

from actors import json_stream
from actors.buffers import Layout
from actors.cuda_driver import kernel, launch
from actors.cuda_layer import CudaLayer
from actors.cuda_memory import CudaSlots
from actors.gpu_regions import ASKED, LAYER, ROWS, Bell, Parts
from actors.hosted_layer import HostedLayer
from actors.native_library import NATIVE, native_library
from actors.slot_format import run_experts
from cluster.errors import HostError

log = structlog.get_logger()

_SOURCE: Final = NATIVE / "exchange.cu"
# More rows than the last take long enough for launches not to matter.
_SIZES: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# How long a guess waits on the device, and how many are launched ahead: with two, launching keeps nobody waiting.
_GUESS_NS: Final = 1_000_000
_AHEAD: Final = 2
_SPIN_US: Final = 2000
_DESK_WORDS = 16
_BLOCKS, _THREADS = 64, 256


class _Request(NamedTuple):
    """What one graph answers."""

    layer: int
    size: int
    """Index into _SIZES of the most rows; its length for more."""


class _Graph(NamedTuple):
    hosted: HostedLayer
    """Whose memory it was captured with."""
    replay: Any


class NeighbourDesk:
    """One engine's, in one host."""

    def __init__(self, layers: Mapping[int, HostedLayer], layout: Layout, outbox: int) -> None:
        """`outbox`: descriptor of the engine's memory, which is closed."""
        self._layers, self._layout = layers, layout
        device = gpu_of(layers)
        assert device is not None
        self._device = device
        torch.cuda.set_device(device)
        parts = Parts.of(layout)
        self._outbox = CudaSlots(device, 1, parts.outbox)
        self._outbox.attach(0, outbox)
        self._inbox = CudaSlots(device, 1, parts.inbox)
        self._inbox.take(0)
        self._inbox.clear(parts.inbox)
        self._parts = parts
        rows, dtype = layout.max_rows, getattr(torch, layout.dtype)
        where = f"cuda:{device}"
        self._x = self._inbox.view(parts.x, dtype, rows, layout.hidden)
        self._places = torch.zeros(rows, layout.top_k, dtype=torch.int32, device=where)
        self._weights = torch.zeros(rows, layout.top_k, device=where)
        self._desk = torch.zeros(_DESK_WORDS, dtype=torch.int32, device=where)
        self._verdict = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        self._verdict_words = self._verdict.numpy().view(np.uint32)
        self._place: dict[int, tuple[HostedLayer, torch.Tensor]] = {}
        self._receive, self._give = (kernel(_SOURCE, name, device) for name in ("receive", "give"))
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[_Request, _Graph] = {}
        self._launched = 0
        self._stop = np.zeros(1, np.uint32)
        library = native_library("doorbell", NATIVE / "doorbell.cpp", ("-O2",))
        self._wait = library.expertmesh_wait
        self._wait.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64]
        self._wait.restype = ctypes.c_uint32
        torch.cuda.synchronize(device)

    def inbox(self) -> int:
        """A descriptor of the memory for requests, to be closed."""
        return self._inbox.export(0)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Make the graphs of small requests, and have what larger ones need compiled."""
        with torch.cuda.stream(self._stream):
            for layer in self._layers:
                for size in range(1, len(_SIZES)):
                    if _SIZES[size - 1] < self._layout.max_rows:
                        self._graph(_Request(layer, size))
            layer, rows = next(iter(self._layers)), 2 * _SIZES[-1]
            while rows < 2 * self._layout.max_rows:
                room = min(rows, self._layout.max_rows)
                self._launch(_Request(layer, len(_SIZES)), self._layers[layer], room, ns=0)
                self._count()
                rows *= 2
            self._stream.synchronize()

    @torch.inference_mode()
    def run(self, bell: Bell) -> None:
        """Answer until :meth:`stop`."""
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)
        words, order = bell.words, sorted(self._layers)
        following = dict(zip(order, order[1:] + order[:1], strict=True))
        asked, stop = bell.address + 4 * ASKED, self._stop.ctypes.data
        seen = 0
        guesses: deque[_Request] = deque()
        while (number := self._wait(asked, seen, stop, _SPIN_US)) != seen:
            seen = number
            layer, rows = int(words[LAYER]), int(words[ROWS])
            request = _Request(layer, _size(rows))
            if guesses and self._took(number):
                # Those before it found nothing.
                while guesses and guesses.popleft() != request:
                    pass
            else:
                guesses.clear()
                self._start(request, rows)
            last = guesses[-1] if guesses else request
            while len(guesses) < _AHEAD and last.size < len(_SIZES):
                last = _Request(following.get(last.layer, last.layer), last.size)
                self._start(last, 0)
                guesses.append(last)

    def stop(self) -> None:
        """End :meth:`run`, from another thread."""
        self._stop[0] = 1

    def close(self) -> None:
        """Once :meth:`run` has ended."""
        self._stream.synchronize()
        self._graphs.clear()
        self._inbox.release(0)
        self._outbox.release(0)

    def _took(self, number: int) -> bool:
        """Whether one of the graphs that were launched took a request; waits until that is known."""
        stop = self._stop.ctypes.data
        while True:
            count, last = (int(word) for word in self._verdict_words)
            if last == number or count == self._launched:
                return int(self._verdict_words[1]) == number
            if self._wait(self._verdict.data_ptr(), count, stop, _SPIN_US) == count:
                return False

    def _start(self, request: _Request, rows: int) -> None:
        try:
            # Slots that go are given back some time after the layer was changed, and only when the GPU is done.
            if request.size < len(_SIZES):
                self._graph(request).replay()
            else:
                self._launch(request, self._layers[request.layer], rows)
            self._count()
        except Exception:
            # The engine goes on without an answer.
            log.exception("a neighbour's request failed", layer=request.layer, rows=rows)

    def _count(self) -> None:
        self._launched = (self._launched + 1) & 0xFFFFFFFF

    def _graph(self, request: _Request) -> _Graph:
        hosted = self._layers[request.layer]
        found = self._graphs.get(request)
        if found is None or found.hosted is not hosted:
            room = min(_SIZES[request.size], self._layout.max_rows)
            # Once without a graph: kernels are compiled at their first use.
            self._launch(request, hosted, room, ns=0)
            self._count()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads of this process may use CUDA meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._launch(request, hosted, room)
            finally:
                graph.capture_end()
            found = self._graphs[request] = _Graph(hosted, graph.replay)
        return found

    def _launch(self, request: _Request, hosted: HostedLayer, room: int, ns: int = _GUESS_NS) -> None:
        kept, parts, layout = hosted.experts, self._parts, self._layout
        if not isinstance(kept, CudaLayer):
            raise HostError(f"layer {request.layer} is not on a GPU")
        place = self._places_of(request.layer, hosted)
        inbox, outbox = self._inbox.address, self._outbox.address
        least = _SIZES[request.size - 1]
        values = (
            inbox, inbox + parts.ids, inbox + parts.weights, place.data_ptr(), kept.room, self._places.data_ptr(),
            self._weights.data_ptr(), self._desk.data_ptr(), self._verdict.data_ptr(), request.layer, least, room,
            layout.top_k, len(place), ns,
        )  # fmt: skip
        launch(self._receive, 1, 1024, values, _RECEIVE_TYPES)
        y = run_experts(
            kept.tensors, kept.form.activation, self._x[:room], self._places[:room], self._weights[:room],
            kept.skipping_S, kept.tuned_for,
        )  # fmt: skip
        vectors = layout.hidden * y.itemsize // 16
        given = y.data_ptr(), outbox + parts.y, outbox, self._desk.data_ptr(), vectors
        launch(self._give, min(_BLOCKS, room), _THREADS, given, _GIVE_TYPES)

    def _places_of(self, layer: int, hosted: HostedLayer) -> torch.Tensor:
        """int32 [E]: the slot of each expert, or -1."""
        known = self._place.get(layer)
        if known is None or known[0] is not hosted:
            slots = [hosted.slots.get(expert, -1) for expert in range(hosted.num_experts)]
            place = torch.tensor(slots, dtype=torch.int32).to(f"cuda:{self._device}")
            self._place[layer] = known = hosted, place
        return known[1]


def gpu_of(layers: Mapping[int, HostedLayer]) -> int | None:
    """The device that all layers are on, if it is a GPU whose memory others can map."""
    devices = {
        hosted.experts.slots.device if isinstance(hosted.experts, CudaLayer) else None
        for hosted in layers.values()
    }
    return devices.pop() if len(devices) == 1 else None


def serve_neighbour(
    layers: Mapping[int, HostedLayer], sock: socket.socket, layout: Layout, outbox: int
) -> None:
    """Answer an engine until it closes the connection, in a thread beside this one."""
    desk = NeighbourDesk(layers, layout, outbox)
    thread = None
    try:
        descriptor = desk.inbox()
        try:
            json_stream.send(sock, {}, descriptor)
        finally:
            os.close(descriptor)
        _, descriptor = json_stream.receive(sock)
        bell = Bell.mapped(descriptor)
        os.close(descriptor)
        desk.prepare()
        thread = threading.Thread(target=desk.run, args=(bell,), name="expertmesh-desk", daemon=True)
        thread.start()
        json_stream.send(sock, {})
        sock.settimeout(None)
        sock.recv(1)
    finally:
        desk.stop()
        if thread is not None:
            thread.join()
        desk.close()


def _size(rows: int) -> int:
    return next((index for index, size in enumerate(_SIZES) if rows <= size), len(_SIZES))


_P, _I, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
_RECEIVE_TYPES: Final = (*(_P,) * 4, _I, *(_P,) * 4, *(_I,) * 5, _U64)
_GIVE_TYPES: Final = (*(_P,) * 4, _I)
