"""A TCP connection to a host that does what bad networks and dying hosts do."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import replace
from types import TracebackType

from cluster.messages import HostAddress


class BadWire:
    """Forwards to a host, and does `fault` to the byte number `at` of all that the host sends.

    ``flip`` changes one bit of it, ``cut`` ends the connection before it, ``stall`` lets nothing more through.
    """

    def __init__(self, address: HostAddress, fault: str, at: int) -> None:
        ip, _, port = address.tcp.rpartition(":")
        self._host = (ip, int(port))
        self._fault, self._at = fault, at
        self.passed = 0
        """Bytes that the host has sent through."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.address = replace(address, tcp=f"127.0.0.1:{self._listener.getsockname()[1]}")
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> BadWire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in self._open:
            _end(sock)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._host)
            self._open += [near, far]
            threading.Thread(target=self._forward, args=(near, far), daemon=True).start()
            threading.Thread(target=self._spoil, args=(far, near), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        _end(target)

    def _spoil(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                start, self.passed = self.passed, self.passed + len(data)
                if start <= self._at < self.passed:
                    cut = self._at - start
                    if self._fault != "flip":
                        target.sendall(data[:cut])
                        if self._fault == "stall":
                            return
                        break
                    data = data[:cut] + bytes([data[cut] ^ 1]) + data[cut + 1 :]
                target.sendall(data)
        _end(source)
        _end(target)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
