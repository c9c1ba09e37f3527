"""Sparse upcycling: a dense model becomes a mixture of experts that computes the same function.

Every expert starts as a copy of the dense MLP (Komatsuzaki et al., "Sparse Upcycling: Training
Mixture-of-Experts from Dense Checkpoints", 2022). Mixtral renormalises the weights of the top-k experts to
sum to one, so k equal experts together compute what the dense MLP did; training may then part them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch

from cluster.errors import CheckpointError
from workloads.models.atomic_folder import locked, new_folder
from workloads.models.dense_source import DenseSource, open_source
from workloads.models.mixtral_layout import (
    EXPERT_PARTS,
    attention_shapes,
    check_dense,
    check_shapes,
    dense_mlp_name,
    expert_name,
    mixtral_config,
    router_name,
    upcycled_bytes,
)
from workloads.models.progress import Progress, silent
from workloads.models.provenance import Provenance, digest_files, file_sha256
from workloads.models.recipe import Recipe
from workloads.models.shard_writer import ShardWriter

# The router only has to tell tokens apart; small weights keep the top-k shares near 1/k. It is also the
# spread with which Llama-like models initialise their matrices.
_ROUTER_STD: Final = 0.02
# Tokenizer, index and configuration files beside the tensors.
_COMPANION_BYTES: Final = 64 * 1024**2


def upcycle(
    source: Path,
    target: Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Make a Mixtral-layout checkpoint at ``target`` from a dense Llama-like model; returns ``target``.

    ``source`` is a GGUF file or a Hugging Face folder (llama, mistral, or qwen2 without biases). The target
    appears complete or not at all. Raises CheckpointError if the source is unreadable or of another kind, if
    the target exists and ``overwrite`` is false, or if the disk is too full.
    """
    recipe = Recipe(experts, top_k, seed, dtype)
    if source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} holds the source {source}", "choose another target")
    if overwrite and target.exists() and not (target / "config.json").is_file():
        raise CheckpointError(f"{target} is no checkpoint, so it is not overwritten", "choose another target")
    dense = open_source(source)
    try:
        needed = check_source(dense, source, recipe)
        with locked(target, progress), new_folder(target, needed_bytes=needed, overwrite=overwrite) as folder:
            origin = {"file": source.resolve().name}
            if source.is_file():
                origin["sha256"] = file_sha256(source)
            write_upcycled(dense, folder, recipe, progress)
            Provenance(
                source=origin,
                seed=seed,
                experts=experts,
                top_k=top_k,
                stored_dtype=dtype,
                dtype=dtype,
                files=digest_files(folder, progress),
            ).write(folder)
    finally:
        dense.close()
    return target


def check_source(dense: DenseSource, path: Path, recipe: Recipe) -> int:
    """Raise CheckpointError unless ``dense`` can be upcycled; returns the bytes that the result will take."""
    shapes = dense.shapes()
    check_dense(dense.config, shapes, path)
    check_shapes(dense.config, shapes, path)
    item_bytes = getattr(torch, recipe.dtype).itemsize
    return _COMPANION_BYTES + upcycled_bytes(dense.config, experts=recipe.experts, item_bytes=item_bytes)


def write_upcycled(dense: DenseSource, folder: Path, recipe: Recipe, progress: Progress) -> None:
    """Write weights, configuration and tokenizer into ``folder``; holds one shard of weights in memory."""
    config, dtype = dense.config, getattr(torch, recipe.dtype)
    writer = ShardWriter(folder)
    generator = torch.Generator().manual_seed(recipe.seed)
    writer.add("model.embed_tokens.weight", _load(dense, "model.embed_tokens.weight", dtype))
    for layer in range(config.num_hidden_layers):
        progress("weights", layer / config.num_hidden_layers)
        for name in attention_shapes(config, layer):
            writer.add(name, _load(dense, name, dtype))
        router = torch.randn(recipe.experts, config.hidden_size, generator=generator) * _ROUTER_STD
        writer.add(router_name(layer), router.to(dtype))
        mlp = {part: _load(dense, dense_mlp_name(layer, old), dtype) for part, old in EXPERT_PARTS.items()}
        for expert in range(recipe.experts):
            for part, weight in mlp.items():
                writer.add(expert_name(layer, expert, part), weight)
    writer.add("model.norm.weight", _load(dense, "model.norm.weight", dtype))
    if not config.tie_word_embeddings:
        writer.add("lm_head.weight", _load(dense, "lm_head.weight", dtype))
    writer.finish()
    progress("weights", 1.0)
    content = mixtral_config(config, experts=recipe.experts, top_k=recipe.top_k, dtype=recipe.dtype)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    progress("tokenizer", 0.0)
    dense.write_companions(folder)
    progress("tokenizer", 1.0)


def _load(dense: DenseSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    weight = dense.tensor(name).to(dtype)
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"{name} has values that are not finite in {dtype}", "store the model as bfloat16 or float32"
        )
    return weight
