"""The first exchange on a data-plane connection: versions, proof of the token, model, dtype, sizes.

Both sides prove that they hold the data-plane key with an HMAC over two fresh nonces, so the key
never travels and a recorded exchange can't be replayed. Messages are JSON behind a 4-byte length:
they happen once a connection, and an error in them can be read by a person.

    engine                                    host
    {protocol, nonce}                  ->
                                       <-     {protocol, nonce, proof} | {error, hint}
    {proof, model, dtype, sizes} (+fd) ->
                                       <-     {host_id} | {error, hint}

Another host that wants to copy experts sends {proof, model, copy} in the engine's place, and asks on as
`actors.blob_server` says.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from typing import Any

from actors import json_stream
from actors.buffers import Layout
from cluster.errors import ProtocolError
from cluster.frame import PROTOCOL_VERSION


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
    message = {
        "proof": _introduce(sock, key, "engine"),
        "model": identity.model,
        "shared": identity.shared,
        **asdict(identity.layout),
    }
    json_stream.send(sock, message, fd if identity.shared else -1)
    return _text(json_stream.receive(sock)[0], "host_id")


def dial_to_copy(sock: socket.socket, key: bytes, model: str) -> str:
    """The same for a host that wants to copy experts of `model`: no rows will come."""
    json_stream.send(sock, {"proof": _introduce(sock, key, "copier"), "model": model, "copy": True})
    return _text(json_stream.receive(sock)[0], "host_id")


def greet(
    sock: socket.socket, key: bytes, host_id: str, model: str, dtype: str, hidden: int
) -> tuple[Identity | None, int]:
    """Host's side. Returns what the engine asked for (None: another host wants to copy) and the descriptor
    of the engine's memory (or -1).

    A refusal is sent to the other side and raised here as ProtocolError.
    """
    fd = -1
    try:
        hello = json_stream.receive(sock)[0]
        if hello.get("protocol") != PROTOCOL_VERSION:
            raise ProtocolError(
                f"host {host_id} speaks data-plane protocol {PROTOCOL_VERSION}, "
                f"the engine {hello.get('protocol')}",
                "run the same expertmesh version on every node",
            )
        theirs, mine = _text(hello, "nonce"), secrets.token_hex(16)
        proof = _proof(key, "host", theirs, mine)
        json_stream.send(sock, {"protocol": PROTOCOL_VERSION, "nonce": mine, "proof": proof})
        request, fd = json_stream.receive(sock)
        role = "copier" if request.get("copy") is True else "engine"
        if not hmac.compare_digest(_text(request, "proof"), _proof(key, role, theirs, mine)):
            raise ProtocolError(f"the {role} could not prove the data-plane token", _TOKEN_HINT)
        if request.get("model") != model:
            raise ProtocolError(
                f"host {host_id} holds model {model[:12]}, the {role} runs {str(request.get('model'))[:12]}",
                "start both from the same checkpoint folder",
            )
        identity = _identity(request, fd, host_id, model, dtype, hidden) if role == "engine" else None
        json_stream.send(sock, {"host_id": host_id})
    except (ProtocolError, KeyError, TypeError, ValueError) as error:
        if fd >= 0:
            os.close(fd)
        if not isinstance(error, ProtocolError):
            json_stream.send(sock, {"error": f"malformed handshake: {error}"})
            raise ProtocolError(f"malformed handshake: {error}") from error
        json_stream.send(sock, {"error": error.message, "hint": error.hint})
        raise
    return identity, fd


def _identity(
    request: dict[str, Any], fd: int, host_id: str, model: str, dtype: str, hidden: int
) -> Identity:
    """What an engine asks for; ProtocolError if this host can't give it."""
    layout = asked_layout(request, host_id, dtype, hidden)
    if bool(request.get("shared")) != (fd >= 0):
        raise ProtocolError("shared memory announced without a descriptor, or the reverse")
    return Identity(model, layout, fd >= 0)


def asked_layout(request: dict[str, Any], host_id: str, dtype: str, hidden: int) -> Layout:
    """The sizes in an engine's message; ProtocolError if this host computes others.

    KeyError, TypeError or ValueError if they are none.
    """
    if request.get("dtype") != dtype or request.get("hidden") != hidden:
        raise ProtocolError(
            f"host {host_id} computes {dtype} rows of {hidden}, the engine sends "
            f"{request.get('dtype')} rows of {request.get('hidden')}",
            "set the same model.dtype for engine and hosts",
        )
    layout = Layout(int(request["max_rows"]), hidden, int(request["top_k"]), dtype)
    if not (0 < layout.max_rows <= 1 << 20 and 0 < layout.top_k <= 255):
        raise ProtocolError(f"sizes out of range: {layout.max_rows} rows, top-{layout.top_k}")
    return layout


def _introduce(sock: socket.socket, key: bytes, role: str) -> str:
    """The first two messages, from this side; this side's proof, once the host's own was good."""
    mine = secrets.token_hex(16)
    json_stream.send(sock, {"protocol": PROTOCOL_VERSION, "nonce": mine})
    hello = json_stream.receive(sock)[0]
    theirs = _text(hello, "nonce")
    if not hmac.compare_digest(_text(hello, "proof"), _proof(key, "host", mine, theirs)):
        raise ProtocolError("the expert host could not prove the data-plane token", _TOKEN_HINT)
    return _proof(key, role, mine, theirs)


_TOKEN_HINT = "use the same cluster token on every node (ray.token_path)"


def _proof(key: bytes, role: str, engine_nonce: str, host_nonce: str) -> str:
    return hmac.new(key, f"{role}:{engine_nonce}:{host_nonce}".encode(), hashlib.sha256).hexdigest()


def _text(message: dict[str, Any], field: str) -> str:
    value = message.get(field)
    if not isinstance(value, str):
        raise ProtocolError(f"handshake message lacks {field!r}")
    return value
