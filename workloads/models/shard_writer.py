"""Write tensors one by one into safetensors shards with the index that Hugging Face's loaders read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cluster.errors import CheckpointError

# Bounds the writer's memory: a shard is held until it is full. Readers map the files and don't care.
MAX_SHARD_BYTES: Final = 512 * 1024**2


class ShardWriter:
    """Collects tensors and writes a shard whenever the next tensor would overfill it."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._total_parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it is copied, so the caller may hand the same one in under several names."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._total_parameters += tensor.numel()

    def finish(self) -> None:
        """Write what is left, give the shards their final names, and write the index."""
        if self._pending:
            self._flush()
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._unnamed(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {
            "metadata": {"total_size": self._total_bytes, "total_parameters": self._total_parameters},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        file = self._unnamed(len(self._shards))
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors hides the OSError of a full disk in its own type
            raise CheckpointError(f"cannot write {file}: {error}", "free some space on that disk") from error
        self._pending = {}
        self._pending_bytes = 0

    def _unnamed(self, number: int) -> Path:
        """Where a shard lies until the number of all shards, a part of its name, is known."""
        return self._folder / f"shard-{number:05d}.safetensors"
