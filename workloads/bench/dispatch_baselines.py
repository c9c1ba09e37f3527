"""What a dispatch is compared with, without Ray: the floor, a socket that carries the payload, ZeroMQ.

Each has an echo process of its own and a client that opens one path per payload size.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import struct
from collections.abc import Callable, Iterator
from socket import MSG_WAITALL

import numpy as np

# The header of the floor: nothing smaller could name a request.
_PING_BYTES = 32
_SIZE = struct.Struct("<Q")


def echo_headers(ready: Callable[[], None], name: str) -> None:
    """The floor's other end: 32 bytes back, nothing else."""
    for sock in _connections(name, ready):
        buffer = bytearray(_PING_BYTES)
        while sock.recv_into(buffer, _PING_BYTES, MSG_WAITALL):
            sock.send(buffer)


def echo_payload(ready: Callable[[], None], name: str) -> None:
    """The whole payload back; its size comes first on each connection."""
    for sock in _connections(name, ready):
        (size,) = _SIZE.unpack(sock.recv(_SIZE.size, MSG_WAITALL))
        buffer = bytearray(size)
        while sock.recv_into(buffer, size, MSG_WAITALL):
            sock.sendall(buffer)


def echo_zeromq(ready: Callable[[], None], name: str) -> None:
    """The whole payload back over ZeroMQ."""
    import zmq

    answers = zmq.Context().socket(zmq.REP)
    answers.bind(f"ipc://@{name}")
    ready()
    while True:
        answers.send(answers.recv(copy=False), copy=False)


@contextlib.contextmanager
def floor_path(name: str, x: np.ndarray, out: np.ndarray) -> Iterator[Callable[[], None]]:
    """A bare ping-pong, the payload copied into shared memory before and out of it after."""
    with _connect(name) as sock:
        size, rows, sums = x.nbytes, x.data.cast("B"), out.data.cast("B")
        # As in a dispatch, rows and sums have places of their own. Views of memory are Python's fastest copy.
        memory = memoryview(mmap.mmap(-1, 2 * size))
        rows_shared, sums_shared = memory[:size], memory[size:]
        ping, pong = bytearray(_PING_BYTES), bytearray(_PING_BYTES)

        def call() -> None:
            rows_shared[:] = rows
            sock.send(ping)
            sock.recv_into(pong, _PING_BYTES, MSG_WAITALL)
            sums[:] = sums_shared

        yield call


@contextlib.contextmanager
def socket_path(name: str, x: np.ndarray, out: np.ndarray) -> Iterator[Callable[[], None]]:
    """The payload through the socket, there and back."""
    with _connect(name) as sock:
        sock.sendall(_SIZE.pack(x.nbytes))
        there, back, size = x.data.cast("B"), out.data.cast("B"), x.nbytes

        def call() -> None:
            sock.sendall(there)
            sock.recv_into(back, size, MSG_WAITALL)

        yield call


@contextlib.contextmanager
def zeromq_path(name: str, x: np.ndarray, out: np.ndarray) -> Iterator[Callable[[], None]]:
    """The payload through ZeroMQ over ipc, there and back."""
    import zmq

    there, back = x.data.cast("B"), out.data.cast("B")
    with zmq.Context() as context, context.socket(zmq.REQ) as requests:
        requests.linger = 0
        requests.connect(f"ipc://@{name}")

        def call() -> None:
            requests.send(there)
            back[:] = requests.recv(copy=False).buffer

        yield call


def _connections(name: str, ready: Callable[[], None]) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + name)
        listener.listen()
        ready()
        while True:
            sock, _ = listener.accept()
            with sock:
                yield sock


def _connect(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect("\0" + name)
    return sock
