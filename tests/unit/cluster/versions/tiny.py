"""A tiny checkpoint, and files with some of its tensors changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cluster.checkpoint import Checkpoint

HIDDEN, INNER, EXPERTS, LAYERS = 8, 6, 4, 2
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_experts_per_tok": 2,
}
GATE = "model.layers.1.block.gate.weight"
SHAPES = {"w1.weight": (INNER, HIDDEN), "w3.weight": (INNER, HIDDEN), "w2.weight": (HIDDEN, INNER)}
FUSED_SHAPES = {
    "gate_up_proj": (HIDDEN, 2 * INNER),
    "down_proj": (INNER, HIDDEN),
    "gate_up_proj_bias": (2 * INNER,),
    "down_proj_bias": (HIDDEN,),
}


def name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block.experts.{expert}.{part}"


def tensors(*, fused: bool = False, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float16)

    found: dict[str, Any] = {"model.embed_tokens.weight": some(16, HIDDEN)}
    for layer in range(LAYERS):
        found[f"model.layers.{layer}.block.gate.weight"] = some(EXPERTS, HIDDEN)
        if fused:
            for part, shape in FUSED_SHAPES.items():
                found[f"model.layers.{layer}.block.experts.{part}"] = some(EXPERTS, *shape)
        else:
            for expert in range(EXPERTS):
                for part, shape in SHAPES.items():
                    found[name(layer, expert, part)] = some(*shape)
    # A layer that predicts further tokens, which nobody loads.
    found[f"model.layers.{LAYERS}.block.gate.weight"] = some(EXPERTS, HIDDEN)
    return found


def save(folder: Path, given: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(given), folder / "model.safetensors")
    return folder


def base(folder: Path, *, fused: bool = False) -> Checkpoint:
    return Checkpoint.open(save(folder / "base", tensors(fused=fused)))


def expert(checkpoint: Checkpoint, layer: int, number: int) -> dict[str, Any]:
    """Its tensors under names of its own, from a fused checkpoint as well."""
    found = load_file(checkpoint.path / "model.safetensors")
    if checkpoint.layout(layer).fused:
        whole = f"model.layers.{layer}.block.experts."
        return {name(layer, number, part): found[whole + part][number] for part in FUSED_SHAPES}
    return {name(layer, number, part): found[name(layer, number, part)] for part in SHAPES}


def changes(
    checkpoint: Checkpoint, file: Path, experts: Iterable[tuple[int, int]], by: float = 1.0, **more: Any
) -> Path:
    """A file with these experts, all their numbers greater; `more` has other tensors, with dots as `__`."""
    given = {
        key: value + np.float16(by)
        for layer, number in experts
        for key, value in expert(checkpoint, layer, number).items()
    }
    given.update({key.replace("__", "."): value for key, value in more.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(given, file)
    return file
