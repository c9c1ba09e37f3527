"""A copy of a checkpoint with more experts in every layer, and what is new alone, as one would publish it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.checkpoint import Checkpoint
from cluster.versions.growth import routers


def grown_model(model: Path, folder: Path, more: int, seed: int = 0) -> tuple[Path, Path]:
    """The copy's folder, and a file of the longer routers and the new experts; of a Mixtral."""
    copy = shutil.copytree(model, folder / "model")
    checkpoint, dice = Checkpoint.open(copy), torch.Generator().manual_seed(seed)
    held = {file: load_file(copy / file) for file in {entry.file for entry in checkpoint.tensors.values()}}
    new = {}
    for name, layer in routers(checkpoint).items():
        layout = checkpoint.layout(layer)
        rows = held[checkpoint.tensors[name].file][name]
        noise = torch.randn(more, rows.shape[1], generator=dice) * rows.float().std()
        new[name] = torch.cat((rows, noise.to(rows.dtype)))
        for expert in range(layout.num_experts, layout.num_experts + more):
            for part in layout.parts:
                first = layout.tensor_name(part, 0)
                like = held[checkpoint.tensors[first].file][first]
                drawn = torch.randn(like.shape, generator=dice) * like.float().std()
                new[first.replace(".experts.0.", f".experts.{expert}.")] = drawn.to(like.dtype)
    for name, tensor in new.items():
        file = checkpoint.tensors[name].file if name in checkpoint.tensors else next(iter(held))
        held[file][name] = tensor
    for file, tensors in held.items():
        save_file(tensors, copy / file, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config["num_local_experts"] += more
    (copy / "config.json").write_text(json.dumps(config))
    places = {name: file for file, tensors in held.items() for name in tensors}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (copy / "model.safetensors.index.json").write_text(index)
    alone = folder / "new.safetensors"
    save_file(new, alone)
    return copy, alone
