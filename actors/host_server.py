"""The host's end of the data plane: listens, greets, answers dispatches.

One thread per connection, each blocking in the kernel until its engine sends: no event loop, no
polling, one system call per message each way. Kernels run one at a time under a lock, since each of
them uses all of the host's threads and vLLM's CPU kernel shares one scratch memory per process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from socket import MSG_WAITALL
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import structlog

from actors.blob_server import Blobs, GiveVersion, serve_copies
from actors.buffers import Buffers, Views
from actors.cuda_layer import CudaLayer
from actors.cuda_memory import gpu_name
from actors.gpu_desk import gpu_of, serve_neighbour
from actors.handshake import asked_layout, greet
from actors.header_parts import DISPATCH_LEAD, MAX_KEPT, PARTS, REPLY_LEAD, rest
from actors.hosted_layer import FEW, HostedLayer, Ids
from actors.streams import read_exactly, send_all
from cluster.errors import ExpertmeshError, HostError, ProtocolError
from cluster.frame import (
    DISPATCH,
    DTYPE_CODES,
    ERROR,
    HEADER,
    HEADER_BYTES,
    ITEM_BYTES,
    MAGIC,
    MAX_ERROR_BYTES,
    PING,
    PONG,
    PROTOCOL_VERSION,
    REPLY,
    Frame,
    decode,
    dispatch_bytes,
    encode,
)

log = structlog.get_logger()

# A peer that connects and then says nothing is dropped after this long.
_GREETING_TIMEOUT_S = 10.0


# One for the process, not for the server: vLLM's CPU kernel has one scratch memory per process.
_KERNEL_LOCK = threading.Lock()


def _no_version(blob: str) -> bytes:
    raise HostError("has no store of versions")


class HostServer:
    """Serves `layers` (layer index → HostedLayer) on a unix socket and, if asked, on TCP."""

    def __init__(
        self,
        host_id: str,
        layers: Mapping[int, HostedLayer],
        *,
        manifest: int,
        model: str,
        dtype: str,
        hidden: int,
        key: bytes,
        blobs: Blobs | None = None,
        version: GiveVersion = _no_version,
        kernel_lock: threading.Lock = _KERNEL_LOCK,
    ) -> None:
        """`blobs`: where experts are taken from that other hosts ask for, if this one can give any; `version`: the
        same for those of versions.
        """
        self.host_id = host_id
        self.layers = layers
        self.rows_served = 0
        self.dispatches_served = 0
        self.compute_ns = 0
        self.manifest, self._model, self._dtype, self._hidden = manifest, model, dtype, hidden
        self.dtype_code = DTYPE_CODES[dtype]
        self._key = key
        self._blobs, self._version = blobs, version
        self.kernel_lock = kernel_lock
        self._listeners: list[tuple[socket.socket, threading.Thread]] = []
        self._connections: set[socket.socket] = set()
        self._copiers: set[socket.socket] = set()

    @property
    def connections(self) -> int:
        """Engines connected now."""
        return len(self._connections - self._copiers)

    def listen_unix(self, name: str) -> None:
        """Listen on `name` in the abstract namespace, which leaves no file behind."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _bind(listener, "\0" + name, f"data-plane socket {name!r}")
        self._start(listener)

    def listen_tcp(self, ip: str, port: int = 0) -> str:
        """Listen on TCP; returns `ip:port` with the port that was taken."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, (ip, port), f"data-plane address {ip}:{port}")
        self._start(listener)
        return f"{ip}:{listener.getsockname()[1]}"

    def close(self) -> None:
        """Stop listening and drop every connection; engines see it at once."""
        for sock in [*(listener for listener, _ in self._listeners), *self._connections]:
            # shutdown wakes the thread that blocks in accept or recv; close alone would not.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for _, thread in self._listeners:
            # The address is free only once the thread has left accept.
            thread.join(1.0)
        self._listeners.clear()

    def lend(self, gpu: str, layer: int, expert: int | None) -> tuple[dict[str, Any], int]:
        """How a layer's experts lie on a GPU, and a descriptor of one's memory if one is named (else -1).

        HostError if they are not on that GPU, or not where another process can map them.
        """
        hosted = self.layers.get(layer)
        kept = hosted.experts if hosted is not None else None
        if hosted is None or not isinstance(kept, CudaLayer) or kept.gpu != gpu:
            raise HostError(f"host {self.host_id} has no memory of layer {layer} on GPU {gpu}")
        if expert is not None and expert not in hosted.slots:
            raise HostError(f"host {self.host_id} does not hold expert {expert} of layer {layer}")
        return asdict(kept.form), -1 if expert is None else kept.slots.export(hosted.slots[expert])

    def exchange(self, sock: socket.socket, asked: dict[str, Any], outbox: int) -> None:
        """Compute for an engine on another GPU of this machine until it closes the connection.

        `outbox`: descriptor of its memory, which is closed. HostError if that can't be.
        """
        device = gpu_of(self.layers)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, outbox)
            if device is None:
                raise HostError(f"host {self.host_id} has no experts on a GPU")
            if gpu_name(device) == asked.get("gpu"):
                raise HostError(f"host {self.host_id} is on the engine's own GPU and lends its memory")
            try:
                layout = asked_layout(asked, self.host_id, self._dtype, self._hidden)
            except (KeyError, TypeError, ValueError) as error:
                raise ProtocolError(f"an engine asks for an exchange of {asked}") from error
            undo.pop_all()
        serve_neighbour(self.layers, sock, layout, outbox)

    def _start(self, listener: socket.socket) -> None:
        listener.listen(64)
        thread = threading.Thread(
            target=self._accept, args=(listener,), name="expertmesh-accept", daemon=True
        )
        self._listeners.append((listener, thread))
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), name="expertmesh-link", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self._connections.add(sock)
        try:
            sock.settimeout(_GREETING_TIMEOUT_S)
            identity, fd = greet(sock, self._key, self.host_id, self._model, self._dtype, self._hidden)
            if identity is None:
                self._copiers.add(sock)
                if self._blobs is not None:
                    serve_copies(sock, self._blobs, self._version, self.lend, self.exchange)
                return
            if fd >= 0:
                try:
                    buffers = Buffers.attached(identity.layout, fd)
                finally:
                    os.close(fd)
            else:
                buffers = Buffers.private(identity.layout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(None)
            _Connection(self, sock, buffers, inline=not identity.shared).run()
        except (ConnectionError, TimeoutError):
            pass  # the engine went away: nothing of it is held here
        except (OSError, ExpertmeshError, ValueError) as error:
            log.warning("data-plane connection dropped", host=self.host_id, reason=str(error))
        finally:
            self._connections.discard(sock)
            self._copiers.discard(sock)
            sock.close()


class _Connection:
    """The loop of one engine's connection, with everything it needs at hand."""

    def __init__(self, server: HostServer, sock: socket.socket, buffers: Buffers, *, inline: bool) -> None:
        self._server = server
        self._sock = sock
        self._buffers = buffers
        self._inline = inline
        layout = buffers.layout
        self._slots = np.empty((layout.max_rows, layout.top_k), np.int32)
        self._requests: dict[bytes, _Request] = {}

    def run(self) -> None:
        """Answer frames until the engine closes; ProtocolError if it sends what makes no sense."""
        sock, server, inline = self._sock, self._server, self._inline
        # Bound once: after every wait the processor has forgotten much, so each look-up counts.
        receive, send, find = sock.recv_into, sock.send, self._requests.get
        unpack, pack = PARTS.unpack_from, PARTS.pack
        buffer = bytearray(HEADER_BYTES)
        while receive(buffer, HEADER_BYTES, MSG_WAITALL) == HEADER_BYTES:
            lead, number, asked, _ = unpack(buffer)
            request = find(asked) if lead == DISPATCH_LEAD else None
            # Checked before anything is read: a wrong count must not move the stream out of step.
            if request is None and (request := self._check(buffer)) is None:
                self._answer_rare(buffer)
                continue
            if inline:
                views = request.views
                for part in (views.ids_bytes, views.weights_bytes, views.x_bytes):
                    read_exactly(sock, part)
            try:
                compute_ns = request.compute()
            except Exception as error:
                # Whatever a kernel throws concerns these rows alone; the connection and the host live on.
                log.warning("dispatch failed", host=server.host_id, layer=request.layer, reason=str(error))
                self._send_error(buffer, str(error) or type(error).__name__)
                continue
            reply = pack(REPLY_LEAD, number, request.answer, compute_ns)
            if inline:
                send_all(sock, [reply, request.views.out_bytes])
            else:
                send(reply)

    def _check(self, buffer: bytearray) -> _Request | None:
        """What a header that was not seen before asks for; None if it is no dispatch for this connection."""
        magic, version, kind, _, *fields, _ = HEADER.unpack_from(buffer)
        manifest, epoch, layer, dtype, top_k, rows, hidden, size = fields
        layout = self._buffers.layout
        item_bytes = ITEM_BYTES[layout.dtype]
        due = (MAGIC, PROTOCOL_VERSION, DISPATCH, self._server.dtype_code, layout.top_k, layout.hidden)
        if (
            (magic, version, kind, dtype, top_k, hidden) != due
            or size != dispatch_bytes(rows, hidden, top_k, item_bytes)
            or rows > layout.max_rows
        ):
            return None
        if len(self._requests) >= MAX_KEPT:
            self._requests.clear()
        answer = rest(REPLY, manifest, epoch, layer, dtype, top_k, rows, hidden, rows * hidden * item_bytes)
        views = self._buffers.views(rows)
        request = _Request(layer, self._make_compute(layer, manifest, rows, views), answer, views)
        self._requests[PARTS.unpack_from(buffer)[2]] = request
        return request

    def _make_compute(self, layer: int, manifest: int, rows: int, views: Views) -> Callable[[], int]:
        """The call that runs the layer's experts on the rows in the buffers and returns nanoseconds."""
        server, find, lock = self._server, self._server.layers.get, self._server.kernel_lock
        acquire, release = lock.acquire, lock.release
        ids, slots = Ids.of(views.ids_np), Ids.of(self._slots[:rows])
        x, slots_tensor, weights, out = views.x, slots.tensor, views.weights, views.out
        ids_words, slots_words, few = ids.words, slots.words, 0 < rows * slots.array.shape[1] <= FEW

        def compute() -> int:
            hosted = find(layer)
            if hosted is None:
                raise HostError(f"holds no experts of layer {layer}")
            if manifest != server.manifest:
                raise HostError(f"holds manifest {server.manifest:016x}, the dispatch wants {manifest:016x}")
            # Copied first and checked in the copy, which no engine can change any more.
            if few:
                slots_words[:] = ids_words
            if not (few and max(slots_words) < hosted.same_below):
                hosted.to_slots(ids, slots)
            # Not `with`, which costs twice as much after a wait.
            acquire()
            try:
                started = perf_counter_ns()
                hosted.compute(x, slots_tensor, weights, out)
                elapsed = perf_counter_ns() - started
                server.dispatches_served += 1
                server.rows_served += rows
                server.compute_ns += elapsed
            finally:
                release()
            return elapsed

        return compute

    def _answer_rare(self, buffer: bytearray) -> None:
        """A ping, or something that ends the connection with ProtocolError."""
        frame = decode(buffer)
        if frame.kind != PING:
            raise ProtocolError(f"{frame} on a connection made for {self._buffers.layout}")
        self._sock.send(encode(Frame(PONG, frame.request_id, 0, 0, 0, 0, 0, 0, 0, 0, 0)))

    def _send_error(self, buffer: bytearray, text: str) -> None:
        frame, data = decode(buffer), text.encode()[:MAX_ERROR_BYTES]
        header = Frame(
            ERROR, frame.request_id, frame.manifest, frame.epoch, frame.layer, 0, 0, 0, 0, len(data), 0
        )
        send_all(self._sock, [encode(header), data])


class _Request(NamedTuple):
    """A dispatch header that was found good, with everything that answering it needs."""

    layer: int
    compute: Callable[[], int]
    answer: bytes
    """What the reply's header carries in the same place."""
    views: Views


def _bind(listener: socket.socket, address: str | tuple[str, int], what: str) -> None:
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise HostError(
            f"{what} can't be taken: {error.strerror}", "another host runs there; `expertmesh down`"
        ) from error
