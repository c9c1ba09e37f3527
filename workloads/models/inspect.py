"""What a checkpoint is, from config.json and the headers of its files: no weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.expert_names import is_prediction_head
from cluster.safetensors_headers import DTYPE_NAMES, TensorEntry, read_headers
from workloads.models.unsupported import UNSUPPORTED

# Model types whose served tokens were compared with those of an unchanged engine.
COMPARED_TYPES: Final = frozenset(
    {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe"}
)
_SHARED_COUNT_KEYS: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_INTERMEDIATE_KEYS: Final = ("moe_intermediate_size", "intermediate_size", "ffn_dim")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of the checkpoint's folder."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What :func:`inspect_model` found; sizes in bytes, counts of scalar parameters."""

    path: Path
    architecture: str
    """The class that config.json names, such as ``MixtralForCausalLM``."""
    model_type: str
    layers: int
    moe_layers: int
    experts_per_layer: tuple[int, ...]
    """The different numbers of routed experts that MoE layers have: one, in almost every model."""
    top_k: int
    hidden_size: int
    intermediate_size: int
    """Width of one routed expert (of the MLP, in a dense model)."""
    vocab_size: int
    max_context: int
    """Positions that the model was made for; 0 where config.json does not say."""
    dtypes: Mapping[str, int]
    """Bytes stored in each dtype, the most common first."""
    parameters: int
    active_parameters: int
    """Parameters that take part in one token: all but prediction heads and the experts not chosen."""
    expert_parameters: int
    """Parameters of all routed experts together."""
    shared_experts: int
    """Experts that every token passes, per MoE layer."""
    weight_bytes: int
    expert_bytes: int
    """Bytes on disk of one routed expert (of the largest, where they differ); 0 in a dense model."""
    files: tuple[ModelFile, ...]
    servable: bool
    reason: str
    """Why expertmesh can serve the model or not, in one sentence."""


def inspect_model(path: Path) -> ModelReport:
    """Describe the checkpoint in ``path``, dense or not.

    Raises CheckpointError if the folder, config.json or a weight file is missing or torn.
    """
    config = read_config(path)
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    tensors, _ = read_headers(path)
    checkpoint, reason = _open_experts(path)
    layers = checkpoint.moe_layers if checkpoint else ()
    sizes = {name: prod(entry.shape) for name, entry in tensors.items()}
    routed = sum(layer.num_experts * layer.expert_parameters for layer in layers)
    top_k = checkpoint.top_k if checkpoint else 0
    num_layers = int(text.get("num_hidden_layers", 0))
    heads = sum(size for name, size in sizes.items() if is_prediction_head(name, num_layers))
    idle = sum(max(layer.num_experts - top_k, 0) * layer.expert_parameters for layer in layers)
    total = sum(sizes.values())
    architectures = config.get("architectures") or ["unknown"]
    return ModelReport(
        path=path,
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "unknown")),
        layers=num_layers,
        moe_layers=len(layers),
        experts_per_layer=tuple(sorted({layer.num_experts for layer in layers})),
        top_k=top_k,
        hidden_size=int(text.get("hidden_size", 0)),
        intermediate_size=_first_int(text, _INTERMEDIATE_KEYS),
        vocab_size=int(text.get("vocab_size", 0)),
        max_context=int(text.get("max_position_embeddings") or 0),
        dtypes=_bytes_by_dtype(tensors),
        parameters=total,
        active_parameters=total - heads - idle,
        expert_parameters=routed,
        shared_experts=_shared_experts(text, tensors) if layers else 0,
        weight_bytes=sum(entry.end - entry.start for entry in tensors.values()),
        expert_bytes=max(
            (checkpoint.expert_bytes(layer.index, checkpoint.dtype) for layer in layers), default=0
        )
        if checkpoint
        else 0,
        files=tuple(
            ModelFile(file.name, file.stat().st_size) for file in sorted(path.iterdir()) if file.is_file()
        ),
        servable=checkpoint is not None and checkpoint.model_type not in UNSUPPORTED,
        reason=reason,
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder; raises CheckpointError if it is missing or no JSON object."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", "give a checkpoint in Hugging Face's format") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", "fetch the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object", "fetch the file again")
    return config


def _open_experts(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint if its routed experts can be read, and whether and why it can be served."""
    try:
        checkpoint = Checkpoint.open(path)
        _ = checkpoint.top_k
    except CheckpointError as error:
        return None, f"{error.message}; {error.hint}" if error.hint else error.message
    if checkpoint.model_type in UNSUPPORTED:
        return checkpoint, UNSUPPORTED[checkpoint.model_type]
    if checkpoint.model_type in COMPARED_TYPES:
        return checkpoint, f"{checkpoint.model_type} gives the same tokens as without expertmesh"
    return checkpoint, f"the experts can be read, but {checkpoint.model_type} was not compared yet"


def _bytes_by_dtype(tensors: Mapping[str, TensorEntry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in tensors.values():
        name = DTYPE_NAMES.get(entry.dtype, entry.dtype)
        counts[name] = counts.get(name, 0) + entry.end - entry.start
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _shared_experts(text: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> int:
    if count := _first_int(text, _SHARED_COUNT_KEYS):
        return count
    return int(any(".shared_expert." in name or ".shared_mlp." in name for name in tensors))


def _first_int(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
