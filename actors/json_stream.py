"""JSON messages behind a 4-byte length, for what happens once a connection or once an expert.

They can be read by a person. A message with the key "error" is a refusal in the other side's words.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from actors.streams import read_exactly
from cluster.errors import ProtocolError

_LENGTH = struct.Struct("<I")
# A message is a few hundred bytes; a longer one is something else.
_MAX_MESSAGE = 16_384


class RefusedError(ProtocolError):
    """The other side refuses what was asked for; the connection is in order."""


def send(sock: socket.socket, message: dict[str, Any], fd: int = -1) -> None:
    """Send one message, with a descriptor on a unix socket if `fd` is one."""
    data = json.dumps(message).encode()
    framed = _LENGTH.pack(len(data)) + data
    if fd >= 0:
        socket.send_fds(sock, [framed], [fd])
    else:
        sock.sendall(framed)


def receive(sock: socket.socket) -> tuple[dict[str, Any], int]:
    """One message and the descriptor that came with it (or -1).

    Raises RefusedError for a refusal, ProtocolError for what is no message, ConnectionError if there is none.
    """
    fd = -1
    if sock.family == socket.AF_UNIX:
        # A descriptor rides on the first byte of its message, so the length is read with it.
        head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 1, socket.MSG_WAITALL)
        fd = fds[0] if fds else -1
    else:
        head = sock.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(head) < _LENGTH.size:
        raise ConnectionError("the other side closed the connection")
    (size,) = _LENGTH.unpack(head)
    if size > _MAX_MESSAGE:
        raise ProtocolError(f"message of {size} bytes", "something else speaks on this port")
    data = bytearray(size)
    read_exactly(sock, memoryview(data))
    try:
        message = json.loads(data)
    except ValueError as error:
        raise ProtocolError("message is not JSON", "something else speaks on this port") from error
    if not isinstance(message, dict):
        raise ProtocolError("message is not an object")
    if "error" in message:
        raise RefusedError(str(message["error"]), str(message.get("hint", "")))
    return message, fd
