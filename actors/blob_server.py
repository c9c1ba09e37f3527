"""Answers a host that copies experts, on a connection of its own and in that connection's thread.

After the handshake the copier asks, and is answered in turn. Questions are JSON, as `actors.json_stream` sends
them; what is given comes with its size before it and its sha256 behind it (`actors.blob`).

    copier                                     host
    {ask: "outline"}                       ->
                                           <-  {bytes}, an Outline as JSON, sha256 | {error, hint}
    {ask: "blob", layer, expert}           ->
                                           <-  {bytes}, safetensors, sha256 | {error, hint}
"""

from __future__ import annotations

import socket
from typing import Any, Final, Protocol

from pydantic import TypeAdapter

from actors import json_stream
from actors.blob import send_blob, send_hashed
from actors.blob_source import Blob
from cluster.errors import CheckpointError, HostError, ProtocolError
from cluster.messages import Outline

OUTLINE: Final = TypeAdapter(Outline)
# A copier packs one expert between two questions, or waits for a disk; one that takes longer hangs.
_STALL_S: Final = 120.0


class Blobs(Protocol):
    """Where a host takes what others copy, as `actors.blob_source.FolderBlobs`."""

    @property
    def outline(self) -> Outline: ...
    def blob(self, layer: int, expert: int) -> Blob:
        """One expert; CheckpointError or HostError if it can't be given."""


def serve_copies(sock: socket.socket, blobs: Blobs) -> None:
    """Answer until the copier closes (ConnectionError), asks what makes no sense, or a file can't be read."""
    sock.settimeout(_STALL_S)
    if sock.family == socket.AF_INET:
        # Or the last piece of each expert would wait for the copier's acknowledgement of those before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        question = json_stream.receive(sock)[0]
        if question.get("ask") == "outline":
            text = OUTLINE.dump_json(blobs.outline)
            send_hashed(sock, len(text), [memoryview(text)])
            continue
        layer, expert = _wanted(question)
        try:
            pieces, fused = blobs.blob(layer, expert)
        except (CheckpointError, HostError) as error:
            json_stream.send(sock, {"error": error.message, "hint": error.hint})
            continue
        send_blob(sock, pieces, fused=fused)


def _wanted(question: dict[str, Any]) -> tuple[int, int]:
    layer, expert = question.get("layer"), question.get("expert")
    if question.get("ask") != "blob" or not isinstance(layer, int) or not isinstance(expert, int):
        raise ProtocolError(f"a host that copies asks for {question}")
    return layer, expert
