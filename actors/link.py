"""The engine's end of the connection to one expert host.

`send` puts the rows into the connection's memory and a header on the socket, `receive` waits for the
header that answers it. Between the two the dispatcher sends to the other hosts.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from socket import MSG_DONTWAIT, MSG_PEEK, MSG_WAITALL
from time import perf_counter_ns
from typing import NamedTuple, NoReturn

from actors.buffers import Buffers, Layout, Views
from actors.handshake import Identity, dial
from actors.header_parts import DISPATCH_LEAD, MAX_KEPT, PARTS, REPLY_LEAD, rest
from actors.raw_memory import RawMemory
from actors.streams import open_stream, read_exactly, send_all
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
    Frame,
    decode,
    dispatch_bytes,
    encode_into,
)
from cluster.messages import HostAddress

Exchange = Callable[[int, int, int, int], None]
"""Of the addresses of x, weights, int32 ids, and of the sums to be written."""

# A wait is set anew only if it is to change by more than a quarter: that costs a system call.
_SAME_WAIT = 0.25


FAILURES = (OSError, ProtocolError, HostError)
"""What a link raises if its host can't answer; of these, a LateError and a HostError leave the connection whole."""


class LateError(TimeoutError):
    """The host has not begun to answer in time. The connection is in order, and the answer may still come."""


class _Message(NamedTuple):
    """What every dispatch of as many rows to the same layer has in common."""

    asked: bytes
    """The constant part of its header (see `actors.header_parts`)."""
    answered: bytes
    """What a well-formed answer has in that place."""
    rows: int
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
        self._request_id = self._answered_id = 0
        self._wait_s = 0.0
        self.sent_ns = 0
        """When the last request was sent, in `perf_counter_ns`."""
        self._manifest = self._epoch = 0
        self._dtype_code = DTYPE_CODES[layout.dtype]
        self._row_bytes = dispatch_bytes(1, layout.hidden, layout.top_k, ITEM_BYTES[layout.dtype])
        self._out_bytes = layout.hidden * ITEM_BYTES[layout.dtype]
        self._top_k, self._hidden = layout.top_k, layout.hidden
        self.exchanges: dict[tuple[int, int], Exchange] = {}
        """Those that were made, by layer and rows."""
        self._messages: dict[tuple[int, int], _Message] = {}
        self._sent: _Message | None = None

    @property
    def connected(self) -> bool:
        return self._sock is not None

    @property
    def owes(self) -> bool:
        """Whether the answer to the last request has not been read."""
        return self._answered_id != self._request_id

    def fileno(self) -> int:
        """The socket's descriptor, for `poll`."""
        if self._sock is None:
            raise ConnectionError("not connected")
        return self._sock.fileno()

    @property
    def where(self) -> str:
        """The address in use."""
        return self.address.unix if self.local else self.address.tcp

    def connect(self, timeout_s: float) -> None:
        """Connect and shake hands; OSError if nobody listens, ProtocolError if the host refuses."""
        self.close()
        sock = open_stream(self.address, self.local, timeout_s)
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
        self._sock, self._buffers, self._wait_s = sock, buffers, 0.0
        self._answered_id = self._request_id

    def set_deadline(self, seconds: float) -> None:
        """Longest wait of one `receive` (and of one `send` over TCP), within a quarter."""
        if self._sock is None:
            raise ConnectionError("not connected")
        if abs(seconds - self._wait_s) <= _SAME_WAIT * self._wait_s:
            return
        self._wait_s = seconds
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    @property
    def buffers(self) -> Buffers:
        """The connection's memory; ConnectionError if there is no connection."""
        if self._buffers is None:
            raise ConnectionError("not connected")
        return self._buffers

    def set_epoch(self, manifest: int, epoch: int) -> None:
        """What every dispatch names from now on; between two steps."""
        self._manifest, self._epoch = manifest, epoch
        self._forget()

    def make_exchange(self, layer: int, rows: int) -> Exchange:
        """The call that sends `rows` rows as they lie in memory, and writes their sums; kept in `exchanges`.

        It may be repeated while the connection lasts, and raises what `send` and `receive` raise.
        """
        sock = self._sock
        if sock is None:
            raise ConnectionError("not connected")
        message = self._make_message(layer, rows)
        # All bound here: after a wait the processor has forgotten much, and every look-up counts.
        asked, answered, _, views = message
        ids_there, weights_there, x_there, out_there = views[-4:]
        of_pairs, of_rows = RawMemory(len(ids_there)), RawMemory(len(x_there))
        local, answer = self.local, self._answer
        pack, unpack, send, receive = PARTS.pack, PARTS.unpack_from, sock.send, sock.recv_into

        def exchange(x: int, weights: int, ids: int, out: int) -> None:
            ids_there[:] = of_pairs[ids]
            weights_there[:] = of_pairs[weights]
            x_there[:] = of_rows[x]
            if not local:
                self._send(message)
                self._receive(message)
                of_rows[out][:] = out_there
                return
            self._request_id = request_id = (self._request_id + 1) & 0xFFFFFFFF
            send(pack(DISPATCH_LEAD, request_id, asked, 0))
            # Found before the wait: the host is busy anyway.
            sums = of_rows[out]
            try:
                got = receive(answer, HEADER_BYTES, MSG_WAITALL)
            except BlockingIOError:
                raise self._late() from None
            lead, number, rest, self.compute_ns = unpack(answer)
            if got != HEADER_BYTES or rest != answered or number != request_id or lead != REPLY_LEAD:
                self._unexpected(message, got)
            else:
                self._answered_id = request_id
            sums[:] = out_there

        self.exchanges[layer, rows] = exchange
        return exchange

    def send(self, layer: int, rows: int) -> None:
        """Announce the rows that lie in the connection's memory; OSError if the connection is gone."""
        message = self._messages.get((layer, rows))
        if message is None:
            message = self._make_message(layer, rows)
        self._sent = message
        self._send(message)

    def receive(self) -> None:
        """Wait for the answer to the last `send`; its sums are then in the connection's memory.

        Answers to earlier requests that were given up are read and dropped. Raises HostError with the host's own
        words, LateError past the deadline, ConnectionError if the host is gone, ProtocolError if the answer makes
        no sense.
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
        self.sent_ns = perf_counter_ns()
        if self.local:
            sock.send(header)
        else:
            views = message.views
            send_all(sock, [header, views.ids_bytes, views.weights_bytes, views.x_bytes])

    def _receive(self, message: _Message) -> None:
        sock = self._sock
        if sock is None:
            raise ConnectionError("not connected")
        try:
            got = sock.recv_into(self._answer, HEADER_BYTES, MSG_WAITALL)
        except BlockingIOError:
            raise self._late() from None
        lead, number, answered, self.compute_ns = PARTS.unpack_from(self._answer)
        if (
            got != HEADER_BYTES
            or answered != message.answered
            or number != self._request_id
            or lead != REPLY_LEAD
        ):
            self._unexpected(message, got)
            return
        self._answered_id = number
        if not self.local:
            self._read(message.views.out_bytes)

    def _unexpected(self, message: _Message, got: int) -> None:
        """Drop an answer to a request that was given up, and wait on; raises what else may have come."""
        frame = self._decode(got)
        if frame.request_id == self._request_id:
            self._answered_id = frame.request_id
            self._refuse(frame)
        self._drop(frame)
        self._receive(message)

    def catch_up(self) -> bool:
        """Read and drop the answers that have come, without waiting; whether none is owed any more.

        Raises ConnectionError if the host is gone.
        """
        sock = self._sock
        if sock is None:
            raise ConnectionError("not connected")
        while self.owes:
            try:
                if len(sock.recv(HEADER_BYTES, MSG_PEEK | MSG_DONTWAIT)) not in (0, HEADER_BYTES):
                    return False
                got = sock.recv_into(self._answer, HEADER_BYTES, MSG_DONTWAIT)
            except BlockingIOError:
                return False
            frame = self._decode(got)
            self._answered_id = frame.request_id
            self._drop(frame)
        return True

    def has_answer(self) -> bool:
        """Whether `receive` would find the answer to the last request, or that there will be none.

        Reads and drops answers to earlier ones that have come.
        """
        sock = self._sock
        if sock is None:
            return True
        while True:
            try:
                head = sock.recv(HEADER_BYTES, MSG_PEEK | MSG_DONTWAIT)
                if 0 < len(head) < HEADER_BYTES:
                    return False
                if not head or decode(head).request_id == self._request_id:
                    return True
                sock.recv_into(self._answer, HEADER_BYTES, MSG_WAITALL)
                self._drop(decode(head))
            except BlockingIOError:
                return False
            except (OSError, ProtocolError):
                return True

    def _drop(self, frame: Frame) -> None:
        """Read what follows the header of an answer that nobody waits for."""
        if frame.kind not in (REPLY, ERROR, PONG):
            raise ProtocolError(f"host {self.address.host_id} sent {frame} unasked")
        if frame.kind == ERROR or (frame.kind == REPLY and not self.local):
            self._read(memoryview(bytearray(frame.payload_bytes)))

    def _read(self, view: memoryview) -> None:
        assert self._sock is not None
        try:
            read_exactly(self._sock, view)
        except TimeoutError as error:
            # Half an answer was read: the stream can't be used any more.
            raise ConnectionError(str(error)) from None

    def _make_message(self, layer: int, rows: int) -> _Message:
        if len(self._messages) >= MAX_KEPT:
            self._forget()
        same = (self._manifest, self._epoch, layer, self._dtype_code, self._top_k, rows, self._hidden)
        message = self._messages[layer, rows] = _Message(
            rest(DISPATCH, *same, rows * self._row_bytes),
            rest(REPLY, *same, rows * self._out_bytes),
            rows,
            self.buffers.views(rows),
        )
        return message

    def _late(self) -> LateError:
        return LateError(f"expert host {self.address.host_id} did not answer in time")

    def _decode(self, got: int) -> Frame:
        """The header that was read into `_answer`; ConnectionError if it is not whole."""
        if got < HEADER_BYTES:
            raise ConnectionError(f"expert host {self.address.host_id} closed the connection")
        return decode(self._answer)

    def _refuse(self, frame: Frame) -> NoReturn:
        """Raise what an answer says that is not the expected one, or that it makes no sense."""
        if frame.kind == ERROR:
            text = bytearray(frame.payload_bytes)
            self._read(memoryview(text))
            raise HostError(f"expert host {self.address.host_id}: {text.decode(errors='replace')}")
        raise ProtocolError(
            f"host {self.address.host_id} answered {frame}, the reply to {self._request_id} was due"
        )

    def ping(self, timeout_s: float) -> float:
        """Round-trip time in seconds of an empty frame; raises as `receive` does."""
        self.set_deadline(timeout_s)
        if self._sock is None:
            raise ConnectionError("not connected")
        self._request_id = (self._request_id + 1) & 0xFFFFFFFF
        encode_into(self._header, PING, self._request_id, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        started = time.perf_counter()
        self._sock.sendall(self._header)
        while True:
            try:
                got = self._sock.recv_into(self._answer, HEADER_BYTES, MSG_WAITALL)
            except BlockingIOError:
                raise self._late() from None
            frame = self._decode(got)
            if frame.request_id == self._request_id:
                break
            self._drop(frame)
        self._answered_id = self._request_id
        if frame.kind != PONG:
            raise ProtocolError(f"host {self.address.host_id} answered a ping with kind {frame.kind}")
        return time.perf_counter() - started

    def close(self) -> None:
        """Drop the connection and its memory; the host notices at once."""
        if self._sock is not None:
            self._sock.close()
        self._sock = self._buffers = self._sent = None
        # They hold views of the connection's memory.
        self._forget()

    def _forget(self) -> None:
        self._messages.clear()
        self.exchanges.clear()
