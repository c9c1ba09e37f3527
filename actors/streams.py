"""Stream sockets to a host, and whole messages over them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from cluster.messages import HostAddress


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


def open_stream(address: HostAddress, local: bool, timeout_s: float) -> socket.socket:
    """Connect to a host by its unix socket (`local`), else by TCP; OSError if nobody listens there."""
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
