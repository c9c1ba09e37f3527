"""The engine's end of the connection to one expert host.

`send` puts the rows into the connection's memory and a header on the socket, `receive` waits for the
header that answers it. Between the two the dispatcher sends to the other hosts.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from socket import MSG_WAITALL
from typing import Any, NamedTuple, NoReturn

from actors.buffers import Buffers, Layout, Views
from actors.handshake import Identity, dial
from actors.header_parts import DISPATCH_LEAD, MAX_KEPT, PARTS, REPLY_LEAD, rest
from actors.raw_memory import RawMemory
from cluster.errors import HostError, ProtocolError
from cluster.frame import (
    DISPATCH,
    DTYPE_CODES,
    ERROR,
    HEADER_BYTES,
    ITEM_BYTES,
    PING,
    PONG,
    REPLY,
    decode,
    dispatch_bytes,
    encode_into,
)
from cluster.messages import HostAddress


class _Message(NamedTuple):
    """What every dispatch of as many rows to the same layer has in common."""

    asked: bytes
    """The constant part of its header (see `actors.header_parts`)."""
    answered: bytes
    """What a well-formed answer has in that place."""
    rows: int
    pair_bytes: int
    """Of the ids, and of the weights."""
    row_bytes: int
    """Of the rows, and of their sums."""
    views: Views


class HostLink:
    """One connection: a unix socket with shared memory on the same node, else TCP.

    Not safe for several threads: a worker steps in one thread, and each worker has its own links.
    """

    def __init__(self, address: HostAddress, layout: Layout, *, local: bool, model: str, key: bytes) -> None:
        self.address = address
        self.layout = layout
        self.local = local
        self.compute_ns = 0
        """Nanoseconds that the host computed for the last reply."""
        self._model = model
        self._key = key
        self._sock: socket.socket | None = None
        self._buffers: Buffers | None = None
        self._header = bytearray(HEADER_BYTES)
        self._answer = bytearray(HEADER_BYTES)
        self._request_id = 0
        self._dtype_code = DTYPE_CODES[layout.dtype]
        self._row_bytes = dispatch_bytes(1, layout.hidden, layout.top_k, ITEM_BYTES[layout.dtype])
        self._out_bytes = layout.hidden * ITEM_BYTES[layout.dtype]
        self._top_k, self._hidden = layout.top_k, layout.hidden
        self._messages: dict[tuple[int, int, int, int], _Message] = {}
        self._sent: _Message | None = None
        self._memory = RawMemory(layout.max_rows * max(self._out_bytes, layout.top_k * 4))

    @property
    def connected(self) -> bool:
        return self._sock is not None

    @property
    def where(self) -> str:
        """The address in use."""
        return self.address.unix if self.local else self.address.tcp

    def connect(self, timeout_s: float) -> None:
        """Connect and shake hands; OSError if nobody listens, ProtocolError if the host refuses."""
        self.close()
        sock = _open(self.address, self.local, timeout_s)
        buffers = Buffers.shared(self.layout) if self.local else Buffers.private(self.layout)
        try:
            sock.settimeout(timeout_s)
            host_id = dial(sock, self._key, Identity(self._model, self.layout, self.local), buffers.fd)
            if host_id != self.address.host_id:
                raise ProtocolError(f"expected host {self.address.host_id}, {host_id} answered")
            # Blocking from here on: the kernel's own receive time-out costs no system call per message,
            # where Python's time-outs poll before every read.
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        finally:
            buffers.close_fd()
        self._sock, self._buffers = sock, buffers

    def set_deadline(self, seconds: float) -> None:
        """Longest wait of one `receive` (and of one `send` over TCP)."""
        if self._sock is None:
            raise ConnectionError("not connected")
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    @property
    def buffers(self) -> Buffers:
        """The connection's memory; ConnectionError if there is no connection."""
        if self._buffers is None:
            raise ConnectionError("not connected")
        return self._buffers

    def exchange(
        self, manifest: int, epoch: int, layer: int, rows: int, x: int, weights: int, ids: int, out: int
    ) -> None:
        """Send `rows` rows that lie at these addresses as they are, write the sums to `out`.

        Raises what `send` and `receive` raise; the rows may be sent again after any of it.
        """
        sock = self._sock
        if sock is None:
            raise ConnectionError("not connected")
        message = self._messages.get((manifest, epoch, layer, rows))
        if message is None:
            message = self._make_message(manifest, epoch, layer, rows)
        asked, _, _, pair_bytes, row_bytes, views = message
        kept, view = self._memory.kept.get, self._memory.view
        views.ids_bytes[:] = kept((ids, pair_bytes)) or view(ids, pair_bytes)
        views.weights_bytes[:] = kept((weights, pair_bytes)) or view(weights, pair_bytes)
        views.x_bytes[:] = kept((x, row_bytes)) or view(x, row_bytes)
        if self.local:
            # `_send` without the call: after a wait, every call of a Python function counts.
            self._request_id = request_id = (self._request_id + 1) & 0xFFFFFFFF
            sock.send(PARTS.pack(DISPATCH_LEAD, request_id, asked, 0))
        else:
            self._send(message)
        # Found before the wait: the host is busy anyway.
        sums = kept((out, row_bytes)) or view(out, row_bytes)
        self._receive(message)
        sums[:] = views.out_bytes

    def send(self, manifest: int, epoch: int, layer: int, rows: int) -> None:
        """Announce the rows that lie in the connection's memory; OSError if the connection is gone."""
        message = self._messages.get((manifest, epoch, layer, rows))
        if message is None:
            message = self._make_message(manifest, epoch, layer, rows)
        self._sent = message
        self._send(message)

    def receive(self) -> None:
        """Wait for the answer to the last `send`; its sums are then in the connection's memory.

        Raises HostError with the host's own words, TimeoutError past the deadline, ConnectionError if
        the host is gone, ProtocolError if the answer makes no sense.
        """
        if self._sent is None:
            raise ConnectionError("nothing was sent")
        self._receive(self._sent)

    def _send(self, message: _Message) -> None:
        sock = self._sock
        if sock is None:
            raise ConnectionError("not connected")
        self._request_id = request_id = (self._request_id + 1) & 0xFFFFFFFF
        header = PARTS.pack(DISPATCH_LEAD, request_id, message.asked, 0)
        if self.local:
            sock.send(header)
        else:
            views = message.views
            send_all(sock, [header, views.ids_np, views.weights_np, views.x_raw])

    def _receive(self, message: _Message) -> None:
        sock = self._sock
        if sock is None:
            raise ConnectionError("not connected")
        try:
            got = sock.recv_into(self._answer, HEADER_BYTES, MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError(f"expert host {self.address.host_id} did not answer in time") from None
        if got < HEADER_BYTES:
            raise ConnectionError(f"expert host {self.address.host_id} closed the connection")
        lead, request_id, answered, compute_ns = PARTS.unpack_from(self._answer)
        if answered != message.answered or request_id != self._request_id or lead != REPLY_LEAD:
            self._refuse()
        if not self.local:
            read_exactly(sock, message.views.out_raw.data.cast("B"))
        self.compute_ns = compute_ns

    def _make_message(self, manifest: int, epoch: int, layer: int, rows: int) -> _Message:
        if len(self._messages) >= MAX_KEPT:
            self._messages.clear()
        same = (manifest, epoch, layer, self._dtype_code, self._top_k, rows, self._hidden)
        message = self._messages[manifest, epoch, layer, rows] = _Message(
            rest(DISPATCH, *same, rows * self._row_bytes),
            rest(REPLY, *same, rows * self._out_bytes),
            rows,
            rows * self._top_k * 4,
            rows * self._out_bytes,
            self.buffers.views(rows),
        )
        return message

    def _refuse(self) -> NoReturn:
        """Raise what an answer that is not the expected one says, or that it says nothing sensible."""
        frame = decode(self._answer)
        if frame.kind == ERROR:
            text = bytearray(frame.payload_bytes)
            assert self._sock is not None
            read_exactly(self._sock, memoryview(text))
            raise HostError(f"expert host {self.address.host_id}: {text.decode(errors='replace')}")
        raise ProtocolError(
            f"host {self.address.host_id} answered {frame}, the reply to {self._request_id} was due"
        )

    def ping(self, timeout_s: float) -> float:
        """Round-trip time in seconds of an empty frame; raises as `receive` does."""
        self.set_deadline(timeout_s)
        assert self._sock is not None
        self._request_id = (self._request_id + 1) & 0xFFFFFFFF
        encode_into(self._header, PING, self._request_id, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        started = time.perf_counter()
        self._sock.sendall(self._header)
        got = self._sock.recv_into(self._answer, HEADER_BYTES, MSG_WAITALL)
        if got < HEADER_BYTES:
            raise ConnectionError(f"expert host {self.address.host_id} closed the connection")
        frame = decode(self._answer)
        if frame.kind != PONG or frame.request_id != self._request_id:
            raise ProtocolError(f"host {self.address.host_id} answered a ping with kind {frame.kind}")
        return time.perf_counter() - started

    def close(self) -> None:
        """Drop the connection and its memory; the host notices at once."""
        if self._sock is not None:
            self._sock.close()
        self._sock = self._buffers = self._sent = None
        # They hold views of the connection's memory.
        self._messages.clear()


def read_exactly(sock: socket.socket, view: memoryview) -> None:
    """Fill `view` from a blocking socket; ConnectionError if it closes before."""
    while view:
        try:
            got = sock.recv_into(view, len(view), socket.MSG_WAITALL)
        except BlockingIOError:
            raise TimeoutError("the peer stopped in the middle of a frame") from None
        if not got:
            raise ConnectionError("the peer closed in the middle of a frame")
        view = view[got:]


def send_all(sock: socket.socket, parts: Sequence[Any]) -> None:
    """Write every part in order with as few system calls as the kernel allows."""
    views = [memoryview(part).cast("B") for part in parts]
    while views:
        sent = sock.sendmsg(views)
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if views:
            views[0] = views[0][sent:]


def _open(address: HostAddress, local: bool, timeout_s: float) -> socket.socket:
    if local:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect("\0" + address.unix)
        except BaseException:
            sock.close()
            raise
        return sock
    ip, _, port = address.tcp.rpartition(":")
    sock = socket.create_connection((ip, int(port)), timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock
