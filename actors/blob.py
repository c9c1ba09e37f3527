"""One expert on its way between two hosts: safetensors with their sha256 behind them.

What is sent are the tensors as the sender has them, with a note in the header's metadata whether they were cut
out of one tensor of all experts (and so may lie transposed). What arrives goes into an anonymous file (memfd),
which is read as a file on disk would be, and gone with its last tensor.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from actors import json_stream
from actors.stored_expert import StoredExpert
from actors.streams import read_exactly
from cluster.errors import ProtocolError
from cluster.messages import MoeLayer
from cluster.safetensors_headers import DTYPE_BYTES, DTYPE_NAMES

CHUNK_BYTES: Final = 1 << 20
"""Most that is read, hashed or sent at once; Python's lock is free meanwhile."""
_PARTS: Final = frozenset(
    part + suffix for part in ("gate", "up", "down", "gate_up") for suffix in ("", ".bias")
)
# Names, dtypes and shapes of at most eight tensors.
_MOST_HEADER_BYTES: Final = 4096
LARGEST_ITEM: Final = max(DTYPE_BYTES.values())
"""Bytes of a parameter at most."""


class Piece(NamedTuple):
    """One tensor of an expert where the sender has it."""

    part: str
    """As `cluster.expert_names` calls it: gate, up, down, gate_up, and the same with ".bias"."""
    dtype: str
    """As safetensors writes it, such as ``BF16``."""
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[memoryview]]
    """Its bytes in order; raises CheckpointError if they can't be read."""

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPE_BYTES[DTYPE_NAMES[self.dtype]]


def send_blob(sock: socket.socket, pieces: Sequence[Piece], *, fused: bool) -> None:
    """Send one expert. What it raises in the middle leaves the connection of no use."""
    entries: dict[str, object] = {"__metadata__": {"fused": str(fused)}}
    end = 0
    for piece in pieces:
        entries[piece.part] = {
            "dtype": piece.dtype,
            "shape": piece.shape,
            "data_offsets": (end, end := end + piece.size),
        }
    text = json.dumps(entries).encode()
    # The format wants tensors to begin at multiples of 8.
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text

    def chunks() -> Iterator[memoryview]:
        yield memoryview(head)
        for piece in pieces:
            yield from piece.chunks()

    send_hashed(sock, len(head) + end, chunks())


def send_hashed(sock: socket.socket, size: int, chunks: Iterable[memoryview]) -> None:
    """Announce `size` bytes, send them, and their sha256 behind them."""
    json_stream.send(sock, {"bytes": size})
    sha, left = hashlib.sha256(), size
    for chunk in chunks:
        sha.update(chunk)
        sock.sendall(chunk)
        left -= len(chunk)
    if left:
        raise ConnectionError(f"{size} bytes were announced, {size - left} sent")
    sock.sendall(sha.digest())


def receive_hashed(sock: socket.socket, most: int, allocate: Callable[[int], memoryview]) -> memoryview:
    """The bytes that were asked for, in memory that `allocate` makes, once they have proved to be whole.

    Raises RefusedError if the other side can't give them, ConnectionError or TimeoutError if it is gone or
    stuck, and ProtocolError if they are more than `most` or do not have the sha256 that they were sent with.
    """
    size = json_stream.receive(sock)[0].get("bytes")
    if not isinstance(size, int) or not 0 < size <= most:
        raise ProtocolError(f"{size} bytes announced, at most {most} are due")
    view, sha, digest = allocate(size), hashlib.sha256(), bytearray(hashlib.sha256().digest_size)
    for start in range(0, size, CHUNK_BYTES):
        chunk = view[start : start + CHUNK_BYTES]
        read_exactly(sock, chunk)
        sha.update(chunk)
    read_exactly(sock, memoryview(digest))
    if sha.digest() != digest:
        raise ProtocolError("what came does not have the sha256 that it was sent with")
    return view


def is_whole(parts: Mapping[str, torch.Tensor], parameters: int) -> bool:
    """Whether these are the tensors of one expert with so many parameters."""
    named = "down" in parts and ("gate_up" in parts or "up" in parts) and parts.keys() <= _PARTS
    return named and sum(tensor.numel() for tensor in parts.values()) == parameters


def receive_blob(sock: socket.socket, layer: MoeLayer, name: str) -> StoredExpert:
    """The expert that was asked for; `name` names it in errors.

    Raises what `receive_hashed` raises, and ProtocolError if it is no expert of this layer.
    """
    fd = os.memfd_create("expertmesh-blob", os.MFD_CLOEXEC)
    try:

        def allocate(size: int) -> memoryview:
            os.ftruncate(fd, size)
            return memoryview(mmap.mmap(fd, size))

        most = layer.expert_parameters * LARGEST_ITEM + _MOST_HEADER_BYTES
        receive_hashed(sock, most, allocate)
        with safe_open(f"/proc/self/fd/{fd}", framework="pt") as file:
            fused = (file.metadata() or {}).get("fused") == "True"
            parts = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise ProtocolError(f"what came is no safetensors file: {error}") from error
    finally:
        os.close(fd)
    if not is_whole(parts, layer.expert_parameters):
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise ProtocolError(f"what came is no expert of layer {layer.index}: {shapes}")
    return StoredExpert(parts, fused, lambda part: f"{name}, {part}")
