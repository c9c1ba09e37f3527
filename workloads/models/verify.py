"""Check that a checkpoint's files are all there, whole, of the right shapes, and unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from cluster.expert_names import is_prediction_head
from workloads.models.expected_shapes import Shapes, expected_shapes
from workloads.models.inspect import read_config
from workloads.models.progress import Progress, silent
from workloads.models.provenance import file_sha256, read_provenance

_INDEX: Final = "model.safetensors.index.json"
# Enough to see what is wrong; a model of the wrong size would otherwise list thousands of tensors.
_MAX_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :func:`verify_model` found; ``ok`` is that there is no problem."""

    path: Path
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    """What could not be checked, and why."""
    files: int
    tensors: int
    weight_bytes: int
    deep: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_many(self, what: str, names: list[str]) -> None:
        """One problem for many tensors: the first few by name, the rest as a number."""
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            self.problems.append(f"{what}: {', '.join(names[:_MAX_NAMED])}{more}")


def verify_model(path: Path, *, deep: bool = True, progress: Progress = silent) -> VerifyReport:
    """Check the checkpoint in ``path`` and list everything that is wrong with it.

    Always: every file of the index is there, every header parses and covers its file to the last byte, the
    index and the headers agree, shapes are those of config.json, files have the recorded sizes. With
    ``deep``: sha256 of every file against expertmesh.json where there is one, and no NaN or infinity in any
    tensor (one is loaded at a time). Raises CheckpointError only if ``path`` is not a folder.
    """
    if not path.is_dir():
        raise CheckpointError(f"no such folder: {path}", "give the folder that holds config.json")
    found = _Findings()
    weight_map = _read_index(path, found)
    names = sorted(set(weight_map.values())) if weight_map else _unindexed_files(path, found)
    shapes: dict[str, tuple[int, ...]] = {}
    whole: list[str] = []
    for number, name in enumerate(names):
        progress("headers", number / len(names))
        headers = _read_header(path / name, found)
        if headers is not None:
            whole.append(name)
            shapes |= headers
            misplaced = [
                tensor for tensor, shard in weight_map.items() if shard == name and tensor not in headers
            ]
            found.add_many(f"{name} lacks tensors that {_INDEX} places there", misplaced)
    progress("headers", 1.0)
    _check_shapes(path, shapes, found, complete=len(whole) == len(names))
    _check_digests(path, found, deep=deep, progress=progress)
    if deep:
        _check_values(path, whole, found, progress)
    return VerifyReport(
        path=path,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
        files=len(names),
        tensors=len(shapes),
        weight_bytes=sum((path / name).stat().st_size for name in whole),
        deep=deep,
    )


def _read_index(path: Path, found: _Findings) -> dict[str, str]:
    """The index's map from tensor to file; empty if there is none, or if it cannot be read."""
    file = path / _INDEX
    if not file.exists():
        return {}
    try:
        weight_map: Mapping[str, Any] = json.loads(file.read_bytes())["weight_map"]
        return {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.problems.append(f"{_INDEX} cannot be read: {error!r}")
        return {}


def _unindexed_files(path: Path, found: _Findings) -> list[str]:
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        found.problems.append("no *.safetensors files")
    return names


def _read_header(file: Path, found: _Findings) -> dict[str, tuple[int, ...]] | None:
    """Shapes of one file's tensors; safetensors itself refuses a file that its header does not cover."""
    if not file.is_file():
        found.problems.append(f"{file.name} is missing")
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        found.problems.append(f"{file.name} is torn ({file.stat().st_size} bytes): {error}")
        return None


def _check_shapes(path: Path, shapes: Shapes, found: _Findings, *, complete: bool) -> None:
    try:
        config = read_config(path)
    except CheckpointError as error:
        found.problems.append(error.message)
        return
    if config.get("quantization_config"):
        found.notes.append("shapes not compared with config.json: the model is quantised")
        return
    expected = expected_shapes(path)
    if expected is None:
        kind = config.get("model_type", "unknown")
        found.notes.append(f"shapes not compared with config.json: transformers cannot build {kind!r}")
        return
    layout = max(expected.layouts, key=lambda names: len(names.keys() & shapes.keys()))
    if complete:  # a missing file is reported already; its tensors would only repeat that
        found.add_many(
            "tensors missing by config.json",
            [n for n in layout if n not in shapes and n not in expected.optional],
        )
    found.add_many(
        "shapes differ from config.json",
        [f"{n} {shapes[n]} instead of {layout[n]}" for n in layout if n in shapes and shapes[n] != layout[n]],
    )
    layers = int(config.get("num_hidden_layers") or 0)
    extra = [n for n in shapes if n not in layout and not (layers and is_prediction_head(n, layers))]
    if extra:
        found.notes.append(f"{len(extra)} tensors that config.json does not ask for, such as {extra[0]}")


def _check_digests(path: Path, found: _Findings, *, deep: bool, progress: Progress) -> None:
    try:
        provenance = read_provenance(path)
    except CheckpointError as error:
        found.problems.append(error.message)
        return
    if provenance is None:
        found.notes.append("digests not compared: there is no expertmesh.json")
        return
    for number, (name, item) in enumerate(provenance.files.items()):
        progress("digests", number / len(provenance.files))
        file = path / name
        if not file.is_file():
            if f"{name} is missing" not in found.problems:
                found.problems.append(f"{name} is missing")
        elif file.stat().st_size != item.size:
            found.problems.append(f"{name} has {file.stat().st_size} bytes, expertmesh.json says {item.size}")
        elif deep and file_sha256(file) != item.sha256:
            found.problems.append(f"{name} has another sha256 than expertmesh.json says")
    progress("digests", 1.0)


def _check_values(path: Path, names: list[str], found: _Findings, progress: Progress) -> None:
    for number, name in enumerate(names):
        progress("values", number / len(names))
        bad = [tensor for tensor, values in _load_all(path / name) if not _is_finite(values)]
        found.add_many(f"{name} has NaN or infinite values", bad)
    progress("values", 1.0)


def _load_all(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _is_finite(values: torch.Tensor) -> bool:
    if not values.is_floating_point():
        return True
    if values.element_size() == 1:  # float8 has no isfinite kernel
        values = values.float()
    return bool(torch.isfinite(values).all())
