"""Which tensor of a checkpoint belongs to which routed expert: pure functions over names and shapes.

Three layouts are in use. Per expert: ``...experts.5.w1.weight`` or ``...experts.5.gate_proj.weight``, each
[out, in]. Fused: ``...experts.gate_up_proj`` [experts, ., .] with an optional ``_bias``. Granite's:
``block_sparse_moe.input_linear.weight`` [experts, out, in]. Shared experts run for every token and are part
of the dense model. Multi-token-prediction layers (an ``mtp`` prefix, or an index beyond the decoder's last
layer) are never loaded, so they are neither.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Final

from cluster.errors import CheckpointError

_LAYER: Final = re.compile(r"^(?P<prefix>(?:.*?\.)?)layers\.(?P<layer>\d+)\.(?P<rest>.+)$")
_PER_EXPERT: Final = re.compile(r"^(?:.+\.)?experts\.(?P<expert>\d+)\.(?P<part>.+)$")
_FUSED: Final = re.compile(r"^(?:.+\.)?experts\.(?P<part>.+)$")
_GRANITE: Final = re.compile(r"^(?:.+\.)?block_sparse_moe\.(?P<part>(?:input|output)_linear\..+)$")

# The canonical names: gate, up, down and gate_up (both in one tensor), each maybe with ".bias".
_PART_NAMES: Final[Mapping[str, str]] = {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "input_linear": "gate_up",
    "output_linear": "down",
}
_COMPLETE: Final = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})
# Names under which quantised checkpoints keep what only their own kernels can read.
_QUANTISED: Final = ("scale", "blocks", "qweight", "qzeros", "g_idx", "packed", "zero_point", "absmax")


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """What one tensor name says: layer, part of the expert, and the expert (``None``: all of them)."""

    layer: int
    part: str
    expert: int | None


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where one layer's experts lie.

    ``parts`` maps a canonical part ("gate", "up", "down", "gate_up", and the same with ".bias") to tensor
    names: one per expert, or, if ``fused``, a single one whose first dimension counts the experts.
    """

    layer: int
    num_experts: int
    fused: bool
    expert_parameters: int
    parts: Mapping[str, tuple[str, ...]] = field(repr=False)

    def tensor_name(self, part: str, expert: int) -> str:
        """Name of the tensor that holds ``part`` of ``expert``."""
        return self.parts[part][0 if self.fused else expert]


def is_prediction_head(name: str, num_layers: int) -> bool:
    """Whether the tensor belongs to a multi-token-prediction layer, which nobody loads."""
    if name.startswith("mtp.") or ".mtp." in name:
        return True
    match = _LAYER.match(name)
    return match is not None and int(match["layer"]) >= num_layers and "vision" not in match["prefix"]


def parse_expert_name(name: str, num_layers: int) -> ExpertTensor | None:
    """What routed expert the tensor belongs to, or ``None`` if to none (dense, shared, MTP)."""
    if "experts." not in name and "_linear." not in name:
        return None
    match = _LAYER.match(name)
    if match is None or is_prediction_head(name, num_layers):
        return None
    layer, rest = int(match["layer"]), match["rest"]
    if "shared_expert" in rest:
        return None
    if inner := _PER_EXPERT.match(rest):
        return ExpertTensor(layer, inner["part"], int(inner["expert"]))
    if (inner := _FUSED.match(rest)) or (inner := _GRANITE.match(rest)):
        # DeepSeek-style routers sometimes keep their correction bias beside the experts.
        if "e_score_correction_bias" in inner["part"]:
            return None
        return ExpertTensor(layer, inner["part"], None)
    return None


def canonical_part(part: str) -> str | None:
    """``"w1.weight"`` → ``"gate"``, ``"down_proj_bias"`` → ``"down.bias"``; ``None`` if not known."""
    is_bias = part.endswith(("_bias", ".bias"))
    base = part.removesuffix("_bias").removesuffix(".bias").removesuffix(".weight")
    name = _PART_NAMES.get(base)
    return f"{name}.bias" if name and is_bias else name


def build_layouts(
    shapes: Mapping[str, tuple[int, ...]], names: Iterable[tuple[str, ExpertTensor]]
) -> tuple[ExpertLayout, ...]:
    """Group the expert tensors by layer, in layer order.

    ``shapes`` gives every tensor's shape. Raises CheckpointError if a part is missing, of an unknown name, or
    quantised.
    """
    layers: dict[int, dict[str, dict[int | None, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in names:
        part = canonical_part(tensor.part)
        if part is None:
            raise _unknown_part(name)
        layers[tensor.layer][part][tensor.expert] = name
    return tuple(_build_layout(layer, parts, shapes) for layer, parts in sorted(layers.items()))


def _build_layout(
    layer: int, parts: Mapping[str, Mapping[int | None, str]], shapes: Mapping[str, tuple[int, ...]]
) -> ExpertLayout:
    weights = {part for part in parts if not part.endswith(".bias")}
    if weights not in _COMPLETE:
        found = ", ".join(sorted(weights)) or "none"
        raise CheckpointError(
            f"layer {layer}: the experts' matrices are incomplete (found: {found})",
            "an expert needs gate, up and down (or up and down); fetch the checkpoint again",
        )
    fused = None in parts["down"]
    if any((None in by_expert) != fused for by_expert in parts.values()):
        raise CheckpointError(
            f"layer {layer}: some expert matrices are fused and some are per expert",
            "save the checkpoint again with one layout",
        )
    if fused:
        names: dict[str, tuple[str, ...]] = {part: (by_expert[None],) for part, by_expert in parts.items()}
        counts = {shapes[tensors[0]][0] for tensors in names.values()}
        if len(counts) != 1:
            raise CheckpointError(f"layer {layer}: the expert tensors disagree on the number of experts")
        num_experts = counts.pop()
        parameters = sum(prod(shapes[tensors[0]][1:]) for tensors in names.values())
    else:
        num_experts = 1 + max(e for by_expert in parts.values() for e in by_expert if e is not None)
        names = {}
        for part, by_expert in parts.items():
            missing = [e for e in range(num_experts) if e not in by_expert]
            if missing:
                raise CheckpointError(
                    f"layer {layer}: {part} of expert {missing[0]} is missing ({len(missing)} in all)",
                    "fetch the checkpoint again",
                )
            names[part] = tuple(by_expert[e] for e in range(num_experts))
            if len({shapes[name] for name in names[part]}) != 1:
                raise CheckpointError(f"layer {layer}: {part} has another shape in some experts")
        parameters = sum(prod(shapes[tensors[0]]) for tensors in names.values())
    return ExpertLayout(layer, num_experts, fused, parameters, names)


def _unknown_part(name: str) -> CheckpointError:
    if any(mark in name.rsplit(".", 1)[-1] for mark in _QUANTISED):
        return CheckpointError(
            f"the experts are quantised: {name}",
            "save the checkpoint in bfloat16, float16 or float32 first",
        )
    return CheckpointError(
        f"a routed expert's tensor has a name of no known layout: {name}",
        "known are w1/w2/w3, gate/up/down_proj, gate_up_proj/down_proj and input/output_linear",
    )
