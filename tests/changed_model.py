"""A copy of a checkpoint with some tensors changed, and the changed ones alone, as one would publish them."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.checkpoint import Checkpoint


def changed_model(
    model: Path,
    folder: Path,
    experts: Collection[tuple[int, int]],
    tensors: Collection[str] = (),
    seed: int = 0,
) -> tuple[Path, Path]:
    """The copy's folder, and a file of the changed tensors: of these (layer, expert), and by name."""
    copy = shutil.copytree(model, folder / "model")
    checkpoint, dice = Checkpoint.open(copy), torch.Generator().manual_seed(seed)
    names = [
        checkpoint.layout(layer).tensor_name(part, expert)
        for layer, expert in experts
        for part in checkpoint.layout(layer).parts
    ]
    changed = {}
    for file in {checkpoint.tensors[name].file for name in (*names, *tensors)}:
        held = load_file(copy / file)
        for name in (*names, *tensors):
            if name in held:
                noise = torch.randn(held[name].shape, generator=dice) * held[name].float().std()
                held[name] = changed[name] = (held[name].float() + noise).to(held[name].dtype)
        save_file(held, copy / file, metadata={"format": "pt"})
    alone = folder / "changed.safetensors"
    save_file(changed, alone)
    return copy, alone
