"""Which of a checkpoint's tensors are loaded for the engine to have a version's own; see vLLM's layerwise reload."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.versions.growth import routers

_LAYER: Final = re.compile(r"^.*?layers\.\d+\.")


def to_load(checkpoint: Checkpoint, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names of the tensors to load when the engine has those of `before` and is to have those of `after`.

    vLLM merges several tensors of a checkpoint into one of its own, and loads only what is complete: so all dense
    tensors of a decoder layer go together.
    """
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    unknown = sorted(name for name in changed if name not in checkpoint.tensors)
    if unknown:
        raise CheckpointError(f"the model has no tensor {unknown[0]}", "publish the version for this model")
    layers = {found[0] for name in changed if (found := _LAYER.match(name))}
    return [
        name
        for name in checkpoint.tensors
        if not checkpoint.is_expert_tensor(name)
        and (name in changed or ((found := _LAYER.match(name)) is not None and found[0] in layers))
    ]


def more_rows(checkpoint: Checkpoint, own: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Layer → the rows that its router has behind the checkpoint's, of those among a version's `own` that have such."""
    return {
        layer: own[name][checkpoint.tensors[name].shape[0] :]
        for name, layer in routers(checkpoint).items()
        if name in own and len(own[name]) > checkpoint.tensors[name].shape[0]
    }


def routers_of(checkpoint: Checkpoint, files: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The routers that a version has of its own, by name, out of the files of its tensors."""
    found = {}
    for name in routers(checkpoint):
        if name in files:
            with safe_open(Path(files[name]), framework="pt") as opened:
                found[name] = opened.get_tensor(name)
    return found


def tensors(
    checkpoint: Checkpoint, names: list[str], files: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor, from the file that the version has of it, else from the checkpoint; of a longer router the rows that
    the checkpoint's has as well.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        file = Path(files[name]) if name in files else checkpoint.path / checkpoint.tensors[name].file
        by_file.setdefault(file, []).append(name)
    for file, of_file in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in of_file:
                shape = checkpoint.tensors[name].shape
                tensor = opened.get_tensor(name)
                yield name, tensor[: shape[0]] if shape else tensor
