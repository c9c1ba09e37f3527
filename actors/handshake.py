"""The first exchange on a data-plane connection: versions, proof of the token, model, dtype, sizes.

Both sides prove that they hold the data-plane key with an HMAC over two fresh nonces, so the key
never travels and a recorded exchange can't be replayed. Messages are JSON behind a 4-byte length:
they happen once a connection, and an error in them can be read by a person.

    engine                                    host
    {protocol, nonce}                  ->
                                       <-     {protocol, nonce, proof} | {error, hint}
    {proof, model, dtype, sizes} (+fd) ->
                                       <-     {host_id} | {error, hint}
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Any

from actors.buffers import Layout
from cluster.errors import ProtocolError
from cluster.frame import PROTOCOL_VERSION

_LENGTH = struct.Struct("<I")
# A handshake message is a few hundred bytes; a longer one is not a handshake.
_MAX_MESSAGE = 16_384


@dataclass(frozen=True, slots=True)
class Identity:
    """What an engine and a host must agree on."""

    model: str
    """Digest of the checkpoint."""
    layout: Layout
    shared: bool
    """Payload through shared memory (a descriptor comes along), else behind the header."""


def dial(sock: socket.socket, key: bytes, identity: Identity, fd: int) -> str:
    """Engine's side. Returns the host's id; ProtocolError with the host's own words if it refuses."""
    mine = secrets.token_hex(16)
    _send(sock, {"protocol": PROTOCOL_VERSION, "nonce": mine})
    hello = _receive(sock)[0]
    theirs = _text(hello, "nonce")
    if not hmac.compare_digest(_text(hello, "proof"), _proof(key, "host", mine, theirs)):
        raise ProtocolError("the expert host could not prove the data-plane token", _TOKEN_HINT)
    message = {
        "proof": _proof(key, "engine", mine, theirs),
        "model": identity.model,
        "shared": identity.shared,
        **asdict(identity.layout),
    }
    _send(sock, message, fd if identity.shared else -1)
    return _text(_receive(sock)[0], "host_id")


def greet(
    sock: socket.socket, key: bytes, host_id: str, model: str, dtype: str, hidden: int
) -> tuple[Identity, int]:
    """Host's side. Returns what the engine asked for and the descriptor of its memory (or -1).

    A refusal is sent to the engine and raised here as ProtocolError.
    """
    try:
        hello = _receive(sock)[0]
        if hello.get("protocol") != PROTOCOL_VERSION:
            raise ProtocolError(
                f"host {host_id} speaks data-plane protocol {PROTOCOL_VERSION}, "
                f"the engine {hello.get('protocol')}",
                "run the same expertmesh version on every node",
            )
        theirs, mine = _text(hello, "nonce"), secrets.token_hex(16)
        _send(sock, {"protocol": PROTOCOL_VERSION, "nonce": mine, "proof": _proof(key, "host", theirs, mine)})
        request, fd = _receive(sock)
        if not hmac.compare_digest(_text(request, "proof"), _proof(key, "engine", theirs, mine)):
            raise ProtocolError("the engine could not prove the data-plane token", _TOKEN_HINT)
        if request.get("model") != model:
            raise ProtocolError(
                f"host {host_id} holds model {model[:12]}, the engine runs {str(request.get('model'))[:12]}",
                "start both from the same checkpoint folder",
            )
        if request.get("dtype") != dtype or request.get("hidden") != hidden:
            raise ProtocolError(
                f"host {host_id} computes {dtype} rows of {hidden}, the engine sends "
                f"{request.get('dtype')} rows of {request.get('hidden')}",
                "set the same model.dtype for engine and hosts",
            )
        layout = Layout(int(request["max_rows"]), hidden, int(request["top_k"]), dtype)
        if not (0 < layout.max_rows <= 1 << 20 and 0 < layout.top_k <= 255):
            raise ProtocolError(f"sizes out of range: {layout.max_rows} rows, top-{layout.top_k}")
        if bool(request.get("shared")) != (fd >= 0):
            raise ProtocolError("shared memory announced without a descriptor, or the reverse")
        _send(sock, {"host_id": host_id})
    except ProtocolError as error:
        _send(sock, {"error": error.message, "hint": error.hint})
        raise
    except (KeyError, TypeError, ValueError) as error:
        _send(sock, {"error": f"malformed handshake: {error}"})
        raise ProtocolError(f"malformed handshake: {error}") from error
    return Identity(model, layout, fd >= 0), fd


_TOKEN_HINT = "use the same cluster token on every node (ray.token_path)"


def _proof(key: bytes, role: str, engine_nonce: str, host_nonce: str) -> str:
    return hmac.new(key, f"{role}:{engine_nonce}:{host_nonce}".encode(), hashlib.sha256).hexdigest()


def _text(message: dict[str, Any], field: str) -> str:
    value = message.get(field)
    if not isinstance(value, str):
        raise ProtocolError(f"handshake message lacks {field!r}")
    return value


def _send(sock: socket.socket, message: dict[str, Any], fd: int = -1) -> None:
    data = json.dumps(message).encode()
    framed = _LENGTH.pack(len(data)) + data
    if fd >= 0:
        socket.send_fds(sock, [framed], [fd])
    else:
        sock.sendall(framed)


def _receive(sock: socket.socket) -> tuple[dict[str, Any], int]:
    """One message and the descriptor that came with it (or -1); an {error} message is raised."""
    fd = -1
    if sock.family == socket.AF_UNIX:
        # A descriptor rides on the first byte of its message, so the length is read with it.
        head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 1, socket.MSG_WAITALL)
        fd = fds[0] if fds else -1
    else:
        head = sock.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(head) < _LENGTH.size:
        raise ConnectionError("closed during the handshake")
    (size,) = _LENGTH.unpack(head)
    if size > _MAX_MESSAGE:
        raise ProtocolError(f"handshake message of {size} bytes", "something else speaks on this port")
    data = sock.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("closed during the handshake")
    try:
        message = json.loads(data)
    except ValueError as error:
        raise ProtocolError("handshake message is not JSON", "something else speaks on this port") from error
    if not isinstance(message, dict):
        raise ProtocolError("handshake message is not an object")
    if "error" in message:
        raise ProtocolError(str(message["error"]), str(message.get("hint", "")))
    return message, fd
