"""The hosts on other GPUs of an engine's machine: rows go straight into their memory, sums come straight back.

Kernels of the engine's own stream write and wait (`actors.cuda_exchange`); neither process's processors touch a row.
The other side is `actors.gpu_desk`. A neighbour that did not answer in time is asked no more, which the device
decides by itself; here it is let go, and asked again later.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import structlog
import torch

from actors import json_stream
from actors.buffers import Layout
from actors.cuda_exchange import MOST_NEIGHBOURS, Exchange
from actors.cuda_memory import CudaSlots
from actors.gpu_regions import Bell, Parts
from actors.handshake import dial_to_copy
from actors.lenders import Source
from actors.streams import open_stream
from cluster.messages import HostAddress

log = structlog.get_logger()

# A host prepares graphs for what it may be asked before it says that it is ready.
_READY_S: Final = 60.0
_AGAIN_S: Final = 1.0
# While there are as many neighbours as the device has room for.
_FULL_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class _GpuNeighbour:
    source: Source
    sock: socket.socket
    inbox: CudaSlots
    outbox: CudaSlots
    bell: Bell

    def row(self, parts: Parts) -> dict[str, int]:
        """As `Exchange.set_neighbour` takes it."""
        there, here = self.inbox.address, self.outbox.address
        return {
            "request": there,
            "ids": there + parts.ids,
            "weights": there + parts.weights,
            "x": there + parts.x,
            "bell": self.bell.address,
            "answered": here,
            "y": here + parts.y,
        }

    def close(self) -> None:
        self.sock.close()
        self.inbox.release(0)
        self.outbox.release(0)
        self.bell.unregister()


class GpuNeighbours:
    """An engine's. Everything happens between two steps but the asking, which threads of their own do."""

    def __init__(
        self, exchange: Exchange, layout: Layout, device: int, gpu: str, *, model: str, key: bytes
    ) -> None:
        """`gpu`: the engine's, as `actors.cuda_memory.gpu_name` has it."""
        self._exchange, self._layout, self._device, self._gpu = exchange, layout, device, gpu
        self._parts, self._model, self._key = Parts.of(layout), model, key
        self._wanted: dict[Source, HostAddress] = {}
        self._asked: set[Source] = set()
        self._again: dict[Source, float] = {}
        # Hosts that are none: on this GPU, or on none.
        self._none: set[Source] = set()
        self._ready: queue.SimpleQueue[tuple[Source, _GpuNeighbour | None]] = queue.SimpleQueue()
        self._numbers: dict[Source, int] = {}
        self._open: dict[int, _GpuNeighbour] = {}

    def begin(self, addresses: Sequence[HostAddress]) -> None:
        """Let those go that are not among these, and ask those that were not asked yet. No work may be under way."""
        self._wanted = {Source.of(address): address for address in addresses}
        self._none &= self._wanted.keys()
        self._again = {source: when for source, when in self._again.items() if source in self._wanted}
        for source in self._numbers.keys() - self._wanted.keys():
            self._let_go(source)
        self.look()

    def look(self) -> bool:
        """Let go who did not answer, use who has become ready, ask who is due; whether anything changed.

        No work may be under way.
        """
        changed = False
        for number in self._exchange.dead:
            if (neighbour := self._open.get(number)) is not None:
                log.warning("neighbour did not answer in time", host=neighbour.source.host_id)
                self._let_go(neighbour.source)
                self._again[neighbour.source] = time.monotonic() + _AGAIN_S
                changed = True
        while not self._ready.empty():
            changed |= self._take(*self._ready.get())
        now = time.monotonic()
        for source, address in self._wanted.items():
            due = self._again.get(source, 0.0) <= now
            if due and source not in self._none | self._asked | self._numbers.keys():
                self._asked.add(source)
                threading.Thread(
                    target=self._ask, args=(source, address), name="expertmesh-neighbour", daemon=True
                ).start()
        return changed

    def wait(self, seconds: float) -> None:
        """Until somebody has answered."""
        if self._asked and self._ready.empty():
            with contextlib.suppress(queue.Empty):
                self._ready.put(self._ready.get(timeout=min(seconds, 2 * _READY_S)))

    @property
    def pending(self) -> int:
        """How many have not answered yet."""
        return len(self._asked)

    def number(self, source: Source) -> int | None:
        """By which the exchange knows a host; None if it is not used."""
        return self._numbers.get(source)

    def close(self) -> None:
        """No work may be under way."""
        for source in list(self._numbers):
            self._let_go(source)

    def _take(self, source: Source, neighbour: _GpuNeighbour | None) -> bool:
        self._asked.discard(source)
        if neighbour is None:
            return False
        free = [number for number in range(MOST_NEIGHBOURS) if number not in self._open]
        if source not in self._wanted or not free:
            neighbour.close()
            self._again[source] = time.monotonic() + _FULL_S
            return False
        self._numbers[source], self._open[free[0]] = free[0], neighbour
        self._exchange.set_neighbour(free[0], neighbour.row(self._parts))
        log.info("neighbour is asked from now on", host=source.host_id, number=free[0])
        return True

    def _let_go(self, source: Source) -> None:
        number = self._numbers.pop(source)
        self._exchange.set_neighbour(number, None)
        self._open.pop(number).close()

    def _ask(self, source: Source, address: HostAddress) -> None:
        found = None
        try:
            found = self._connect(source, address)
        except json_stream.RefusedError as error:
            log.info("no neighbour", host=source.host_id, reason=str(error))
            self._none.add(source)
        except Exception as error:
            # Whatever it was, its experts are dispatched.
            log.warning("no neighbour", host=source.host_id, reason=str(error))
            self._again[source] = time.monotonic() + _AGAIN_S
        self._ready.put((source, found))

    def _connect(self, source: Source, address: HostAddress) -> _GpuNeighbour:
        torch.cuda.set_device(self._device)
        with contextlib.ExitStack() as undo:
            sock = open_stream(address, True, _READY_S)
            undo.callback(sock.close)
            sock.settimeout(_READY_S)
            dial_to_copy(sock, self._key, self._model)
            outbox = CudaSlots(self._device, 1, self._parts.outbox)
            outbox.take(0)
            undo.callback(outbox.release, 0)
            outbox.clear(self._parts.y)
            ask = {"ask": "exchange", "gpu": self._gpu, **asdict(self._layout)}
            _send_and_close(sock, ask, outbox.export(0))
            _, descriptor = json_stream.receive(sock)
            inbox = CudaSlots(self._device, 1, self._parts.inbox)
            inbox.attach(0, descriptor)
            undo.callback(inbox.release, 0)
            bell, descriptor = Bell.made()
            undo.callback(bell.unregister)
            _send_and_close(sock, {"ask": "bell"}, descriptor)
            json_stream.receive(sock)
            undo.pop_all()
        return _GpuNeighbour(source, sock, inbox, outbox, bell)


def _send_and_close(sock: socket.socket, message: dict[str, object], descriptor: int) -> None:
    try:
        json_stream.send(sock, message, descriptor)
    finally:
        os.close(descriptor)
