"""Answers a host that copies experts, on a connection of its own and in that connection's thread.

After the handshake the copier asks, and is answered in turn. Questions are JSON, as `actors.json_stream` sends
them; what is given comes with its size before it and its sha256 behind it (`actors.blob`).

    copier                                     host
    {ask: "outline"}                       ->
                                           <-  {bytes}, an Outline as JSON, sha256 | {error, hint}
    {ask: "blob", layer, expert}           ->
                                           <-  {bytes}, safetensors, sha256 | {error, hint}
    {ask: "version", blob: digest}         ->
                                           <-  {bytes}, a blob of the store of versions, sha256 | {error, hint}
    {ask: "memory", layer, gpu}            ->
                                           <-  {format}, how the layer's experts lie there | {error, hint}
    {ask: "memory", layer, gpu, expert}    ->
                                           <-  {format} (+fd), the expert's memory on that GPU | {error, hint}
    {ask: "exchange", gpu, sizes} (+fd)    ->      an engine on another GPU, see `actors.gpu_desk`
                                           <-  {} (+fd), memory for its requests | {error, hint}
    {ask: "bell"} (+fd)                    ->
                                           <-  {}, once the host is ready; nothing more is said

Blobs of versions are given as the store has them, so that the copier can prove them by the digest that it asked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from pydantic import TypeAdapter

from actors import json_stream
from actors.blob import CHUNK_BYTES, send_blob, send_hashed
from actors.blob_source import Blob
from cluster.errors import CheckpointError, HostError, ProtocolError, VersionError
from cluster.messages import Outline

OUTLINE: Final = TypeAdapter(Outline)
# A copier packs one expert between two questions, or waits for a disk; one that takes longer hangs.
_STALL_S: Final = 120.0


GiveVersion = Callable[[str], bytes]
"""From a digest to a blob of the store of versions, see `actors.variant_reader.VariantReader.give`."""


class Blobs(Protocol):
    """Where a host takes what others copy, as `actors.blob_source.FolderBlobs`."""

    @property
    def outline(self) -> Outline: ...
    def blob(self, layer: int, expert: int) -> Blob:
        """One expert; CheckpointError or HostError if it can't be given."""


Lend = Callable[[str, int, int | None], tuple[dict[str, Any], int]]
"""From a GPU's name, a layer and an expert's number to how it lies there and a descriptor of its memory, see
`actors.host_server.HostServer.lend`."""

Exchange = Callable[[socket.socket, dict[str, Any], int], None]
"""Serves an engine on another GPU until it closes, see `actors.host_server.HostServer.exchange`."""


def serve_copies(
    sock: socket.socket, blobs: Blobs, version: GiveVersion, lend: Lend, exchange: Exchange
) -> None:
    """Answer until the copier closes (ConnectionError), asks what makes no sense, or a file can't be read."""
    sock.settimeout(_STALL_S)
    if sock.family == socket.AF_INET:
        # Or the last piece of each expert would wait for the copier's acknowledgement of those before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        question, descriptor = json_stream.receive(sock)
        try:
            if question.get("ask") == "exchange":
                exchange(sock, question, descriptor)
                return
            answer = _answer(question, blobs, version, lend)
        except (CheckpointError, HostError, VersionError) as error:
            json_stream.send(sock, {"error": error.message, "hint": error.hint})
        else:
            answer(sock)


def _answer(
    question: dict[str, Any], blobs: Blobs, version: GiveVersion, lend: Lend
) -> Callable[[socket.socket], None]:
    """What sends it; CheckpointError, HostError or VersionError if it can't be given."""
    asked, layer, expert, digest = (question.get(name) for name in ("ask", "layer", "expert", "blob"))
    if asked == "outline":
        return partial(_send_bytes, OUTLINE.dump_json(blobs.outline))
    if asked == "version" and isinstance(digest, str):
        return partial(_send_bytes, version(digest))
    if asked == "blob" and isinstance(layer, int) and isinstance(expert, int):
        pieces, fused = blobs.blob(layer, expert)
        return partial(send_blob, pieces=pieces, fused=fused)
    gpu = question.get("gpu")
    if (
        asked == "memory"
        and isinstance(layer, int)
        and isinstance(gpu, str)
        and isinstance(expert, int | None)
    ):
        return partial(_send_memory, *lend(gpu, layer, expert))
    raise ProtocolError(f"a host that copies asks for {question}")


def _send_memory(form: dict[str, Any], descriptor: int, sock: socket.socket) -> None:
    try:
        json_stream.send(sock, {"format": form}, descriptor)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _send_bytes(data: bytes, sock: socket.socket) -> None:
    view, starts = memoryview(data), range(0, len(data), CHUNK_BYTES)
    send_hashed(sock, len(data), (view[start : start + CHUNK_BYTES] for start in starts))
