"""The headers of a folder of safetensors files: which tensors, of what shape, at which bytes.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, and the data. Only the JSON is
read, and checked against the file's length, so a torn download is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from cluster.errors import CheckpointError

# The format's own limit: a longer header means that this is not a safetensors file.
_MAX_HEADER_BYTES: Final = 100_000_000
_SAMPLE_BYTES: Final = 4096
DTYPE_NAMES: Final[Mapping[str, str]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint; ``start`` and ``end`` are byte offsets from the file's beginning."""

    file: str
    dtype: str
    """As safetensors writes it: ``F32``, ``BF16``, ``F16``, ``F8_E4M3``, ..."""
    shape: tuple[int, ...]
    start: int
    end: int


def read_headers(path: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """All tensors under ``path`` by name, and a sha256 over a few kilobytes of every file's data.

    Reads the files that model.safetensors.index.json names, else model.safetensors, else every
    ``*.safetensors``. Raises CheckpointError if one is missing, torn, or lacks a tensor of the index.
    """
    index = _read_index(path)
    tensors: dict[str, TensorEntry] = {}
    samples = hashlib.sha256()
    for file in _weight_files(path, index):
        tensors.update(_read_header(path / file, samples))
    for name, shard in (index or {}).items():
        entry = tensors.get(name)
        if entry is None or entry.file != shard:
            raise CheckpointError(
                f"{path / shard} lacks {name}, which the index places there", "fetch that file again"
            )
    return tensors, samples.digest()


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name. Raises CheckpointError if it is missing or torn."""
    return _read_header(file, hashlib.sha256())


def _read_index(path: Path) -> dict[str, str] | None:
    file = path / "model.safetensors.index.json"
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}", "fetch the file again") from error


def _weight_files(path: Path, index: Mapping[str, str] | None) -> list[str]:
    if index is not None:
        return sorted(set(index.values()))
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} has no *.safetensors files",
            "fetch the weights, or convert them: only safetensors are loaded",
        )
    return files


def _read_header(file: Path, samples: hashlib._Hash) -> dict[str, TensorEntry]:
    """Entries of one safetensors file; feeds three small samples of its data to ``samples``."""
    torn = "the file is torn or incomplete; fetch it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file} is {size} bytes long: no safetensors header", torn)
            length = struct.unpack("<Q", prefix)[0]
            if length > _MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(f"{file}: the header should be {length} bytes, of {size} in all", torn)
            header = json.loads(stream.read(length))
            entries = _parse_header(file.name, header, base=8 + length)
            end = max((entry.end for entry in entries.values()), default=8 + length)
            if end != size:
                raise CheckpointError(f"{file} is {size} bytes long, its header says {end}", torn)
            for position in (8 + length, (8 + length + size) // 2, max(8 + length, size - _SAMPLE_BYTES)):
                stream.seek(position)
                samples.update(stream.read(_SAMPLE_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", "fetch all files of the checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: the header cannot be read: {error!r}", torn) from error
    return entries


def _parse_header(name: str, header: Mapping[str, Any], base: int) -> dict[str, TensorEntry]:
    entries = {}
    for tensor, info in header.items():
        if tensor == "__metadata__":
            continue
        start, end = info["data_offsets"]
        shape = tuple(int(size) for size in info["shape"])
        item_bytes = DTYPE_BYTES.get(DTYPE_NAMES.get(info["dtype"], ""))
        if end < start or (item_bytes and end - start != prod(shape) * item_bytes):
            raise ValueError(f"{tensor}: offsets {start} to {end} do not fit shape {shape}")
        entries[tensor] = TensorEntry(name, str(info["dtype"]), shape, base + start, base + end)
    return entries
