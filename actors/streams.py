"""Whole messages over a blocking stream socket."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any


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
