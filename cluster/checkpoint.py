"""A checkpoint as its headers describe it: which tensors, where, and which of them are routed experts.

Reads config.json and the headers of the safetensors files (JSON behind an 8-byte length), never the weights,
so opening takes milliseconds to a second whatever the model's size, and needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Final

from cluster.errors import CheckpointError
from cluster.expert_names import ExpertLayout, build_layouts, is_prediction_head, parse_expert_name
from cluster.messages import MoeLayer
from cluster.safetensors_headers import DTYPE_BYTES, DTYPE_NAMES, TensorEntry, read_headers

_TOP_K_KEYS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
# Keys of config.json that change without the model changing.
_VOLATILE_KEYS: Final = frozenset({"transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"})


@dataclass(frozen=True)
class Checkpoint:
    """A mixture-of-experts checkpoint on disk; open one with :meth:`open`."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    layouts: Mapping[int, ExpertLayout] = field(repr=False)
    """Where each MoE layer's experts lie, by layer index."""
    digest: str
    """sha256 hex over the architecture (config.json without what may change between two saves), all tensor
    names, dtypes, shapes and places, and a few kilobytes of every file, so that two models of one
    architecture differ. It recognises a model; it does not prove that all its bytes are intact."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json and all headers under ``path``.

        Raises CheckpointError if the folder, config.json or a file is missing, if a file is torn, or if the
        model has no routed experts in a known layout.
        """
        config = _read_config(path)
        tensors, samples = read_headers(path)
        num_layers = _num_layers(config, path)
        experts = [(name, parsed) for name in tensors if (parsed := parse_expert_name(name, num_layers))]
        if not experts:
            raise CheckpointError(
                f"{path} has no routed experts: model type {config.get('model_type', 'unknown')!r}",
                "give the folder of a mixture-of-experts checkpoint with its expert weights",
            )
        try:
            layouts = build_layouts({name: entry.shape for name, entry in tensors.items()}, experts)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}", error.hint) from error
        _check_expert_dtypes(path, tensors, layouts)
        return cls(
            path=path,
            config=config,
            tensors=tensors,
            layouts={layout.layer: layout for layout in layouts},
            digest=_digest(config, tensors, samples),
        )

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, such as ``mixtral``."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of config.json (multimodal models nest it)."""
        return _text_config(self.config)

    @property
    def num_layers(self) -> int:
        """Decoder layers, with experts or without."""
        return _num_layers(self.config, self.path)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream: what is dispatched per row."""
        value = self.text_config.get("hidden_size") or self.text_config.get("d_model")
        if not isinstance(value, int):
            raise CheckpointError(f"{self.path / 'config.json'}: no hidden_size")
        return value

    @property
    def top_k(self) -> int:
        """Routed experts per token (the largest, where layers differ)."""
        for key in _TOP_K_KEYS:
            value = self.text_config.get(key)
            if isinstance(value, int):
                return value
            if isinstance(value, list) and value:
                return max(value)
        raise CheckpointError(
            f"{self.path / 'config.json'}: no number of experts per token",
            f"one of {', '.join(_TOP_K_KEYS)} is expected",
        )

    @cached_property
    def dtype(self) -> str:
        """Dtype of the experts on disk, such as ``bfloat16``."""
        layout = next(iter(self.layouts.values()))
        return DTYPE_NAMES[self.tensors[layout.tensor_name("down", 0)].dtype]

    def stored_dtypes(self, layer: int) -> frozenset[str]:
        """Dtypes in which the experts of ``layer`` lie on disk."""
        return frozenset(
            DTYPE_NAMES[self.tensors[names[0]].dtype] for names in self.layout(layer).parts.values()
        )

    @cached_property
    def moe_layers(self) -> tuple[MoeLayer, ...]:
        """The layers with routed experts, in order."""
        return tuple(
            MoeLayer(layout.layer, layout.num_experts, layout.expert_parameters)
            for layout in self.layouts.values()
        )

    @cached_property
    def expert_tensors(self) -> frozenset[str]:
        """Names of all tensors that belong to routed experts."""
        return frozenset(
            name for layout in self.layouts.values() for names in layout.parts.values() for name in names
        )

    def is_expert_tensor(self, name: str) -> bool:
        """Whether the tensor of this on-disk name belongs to a routed expert."""
        return name in self.expert_tensors

    def expert_bytes(self, layer: int, dtype_name: str) -> int:
        """Bytes of one expert of ``layer`` held as ``dtype_name``, such as ``bfloat16``."""
        return self.layout(layer).expert_parameters * DTYPE_BYTES[dtype_name]

    def layout(self, layer: int) -> ExpertLayout:
        """Where the experts of ``layer`` lie; raises CheckpointError if that layer has none."""
        try:
            return self.layouts[layer]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: layer {layer} has no routed experts",
                f"layers with experts: {', '.join(map(str, self.layouts))}",
            ) from None

    def dense_bytes(self, dtype_name: str) -> int:
        """Bytes of all that the engine loads, held as ``dtype_name``: not routed experts and prediction heads."""
        num_layers = self.num_layers
        return DTYPE_BYTES[dtype_name] * sum(
            prod(entry.shape)
            for name, entry in self.tensors.items()
            if name not in self.expert_tensors and not is_prediction_head(name, num_layers)
        )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            return nested
    thinker = config.get("thinker_config")
    return _text_config(thinker) if isinstance(thinker, dict) else config


def _num_layers(config: Mapping[str, Any], path: Path) -> int:
    text = _text_config(config)
    value = text.get("num_hidden_layers") or text.get("num_layers") or text.get("n_layer")
    if not isinstance(value, int):
        raise CheckpointError(f"{path / 'config.json'}: no num_hidden_layers", "is this a language model?")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"no such folder: {path}", "give the folder that holds config.json")
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        hint = "give a checkpoint in Hugging Face's format: config.json beside *.safetensors"
        raise CheckpointError(f"{file} is missing", hint) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", "fetch the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object", "fetch the file again")
    return config


def _check_expert_dtypes(
    path: Path, tensors: Mapping[str, TensorEntry], layouts: tuple[ExpertLayout, ...]
) -> None:
    for layout in layouts:
        for names in layout.parts.values():
            entry = tensors[names[0]]
            if entry.dtype not in DTYPE_NAMES:
                raise CheckpointError(
                    f"{path / entry.file}: experts of layer {layout.layer} are stored as {entry.dtype}",
                    "save the checkpoint in bfloat16, float16 or float32 first",
                )


def _digest(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], samples: bytes) -> str:
    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k not in _VOLATILE_KEYS and not k.startswith("_")}
            return {key: stable(item) for key, item in kept.items()}
        return value

    places = [
        (name, entry.file, entry.dtype, entry.shape, entry.start, entry.end)
        for name, entry in sorted(tensors.items())
    ]
    sha = hashlib.sha256(json.dumps([stable(config), places], sort_keys=True).encode())
    sha.update(samples)
    return sha.hexdigest()
