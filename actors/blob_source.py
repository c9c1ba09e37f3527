"""What a host gives to others that copy from it.

A host with the model's folder gives any expert of the model, held by it or not: files are read as they are, in
pieces, without torch, so that nothing of it waits for a kernel, and no kernel for it. A host that copied its own
experts gives those that its kernel keeps as plain matrices; what is packed, or on a GPU, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch

from actors.blob import CHUNK_BYTES, Piece
from actors.expert_kernels import Plain
from actors.hosted_layer import HostedLayer
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, HostError
from cluster.messages import Outline

_DTYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Blob(NamedTuple):
    """One expert, ready to be sent."""

    pieces: Sequence[Piece]
    fused: bool
    """See `StoredExpert.fused`."""


class FolderBlobs:
    """Experts out of a checkpoint's folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if a file is missing."""
        self._checkpoint = checkpoint
        config = checkpoint.path / "config.json"
        try:
            self.outline: Final = Outline(
                config.read_text(),
                checkpoint.moe_layers,
                {layer: checkpoint.stored_dtypes(layer) for layer in checkpoint.layouts},
            )
            files = {entry.file for entry in checkpoint.tensors.values()}
            self._known = {file: _version((checkpoint.path / file).stat()) for file in files}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error

    def blob(self, layer: int, expert: int) -> Blob:
        """The expert's tensors as they lie in the files. CheckpointError if there is no such expert."""
        layout = self._checkpoint.layout(layer)
        if not 0 <= expert < layout.num_experts:
            raise CheckpointError(f"{self._checkpoint.path}: layer {layer} has no expert {expert}")
        return Blob([self._piece(layer, part, expert) for part in layout.parts], layout.fused)

    def _piece(self, layer: int, part: str, expert: int) -> Piece:
        layout = self._checkpoint.layout(layer)
        entry = self._checkpoint.tensors[layout.tensor_name(part, expert)]
        start, size, shape = entry.start, entry.end - entry.start, entry.shape
        if layout.fused:
            size //= layout.num_experts
            start, shape = start + expert * size, shape[1:]
        # Now, when it can still be refused in words.
        with self._opened(entry.file):
            pass
        return Piece(part, entry.dtype, shape, lambda: self._read(entry.file, start, size))

    def _read(self, file: str, start: int, size: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, size)))
        with self._opened(file) as descriptor:
            while size:
                read = os.preadv(descriptor, [buffer[: min(len(buffer), size)]], start)
                if not read:
                    raise CheckpointError(f"{self._checkpoint.path / file} ends at {start}")
                yield buffer[:read]
                start, size = start + read, size - read

    @contextmanager
    def _opened(self, file: str) -> Iterator[int]:
        """A descriptor of the file. CheckpointError if it is, before or after, another than was loaded."""
        path = self._checkpoint.path / file
        try:
            with path.open("rb", buffering=0) as stream:
                self._check(stream.fileno(), file)
                yield stream.fileno()
                self._check(stream.fileno(), file)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def _check(self, descriptor: int, file: str) -> None:
        # Of what was put in its place nobody has seen that it is the same model.
        if _version(os.fstat(descriptor)) != self._known[file]:
            raise CheckpointError(f"{self._checkpoint.path / file} was changed since it was loaded")


class HeldBlobs:
    """Experts out of the memory of a host that has no folder."""

    def __init__(self, outline: Outline, layers: Mapping[int, HostedLayer]) -> None:
        self.outline: Final = outline
        self._layers = layers

    def blob(self, layer: int, expert: int) -> Blob:
        """The expert's matrices in the host's own dtype. HostError if it keeps them otherwise, or not at all."""
        hosted = self._layers.get(layer)
        slot = hosted.slot_by_id.get(expert) if hosted and expert >= 0 else None
        if hosted is None or slot is None:
            raise HostError(f"neither has the model's folder nor holds expert {expert} of layer {layer}")
        if not isinstance(hosted.experts, Plain):
            raise HostError("has no folder of the model, and its kernel keeps no plain matrices")
        return Blob([_held(*part) for part in hosted.experts.parts(slot).items()], fused=False)


def _held(part: str, tensor: torch.Tensor) -> Piece:
    memory = tensor.reshape(-1).view(torch.uint8).numpy().data
    chunks = [memory[start : start + CHUNK_BYTES] for start in range(0, len(memory), CHUNK_BYTES)]
    return Piece(part, _DTYPES[tensor.dtype], tuple(tensor.shape), lambda: iter(chunks))


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
