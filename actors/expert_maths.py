"""What one expert of a model computes, as found in transformers' own experts class.

Nearly all mixture-of-experts models in transformers share one experts layout with a few flags (bias, gate,
transposition, concatenation) and now and then a gate of their own. The model is built from its config on the
``meta`` device, which allocates nothing, and its experts modules are asked; nothing here knows model names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from actors.known_maths import known_facts, remember_facts
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError

_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FLAGS: Final = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_WEIGHTS: Final = frozenset({"gate_up_proj", "up_proj", "down_proj"})


@dataclass(frozen=True, slots=True)
class ExpertMaths:
    """The computation of every expert of one layer: up = x·Wᵤᵀ, gated or activated, then down."""

    hidden: int
    intermediate: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    """Whether the module keeps its matrices as [in, out] instead of [out, in]."""
    is_concatenated: bool
    """Whether gate and up are two halves, or alternate: gate0, up0, gate1, up1, ..."""
    activation: str | None
    """``silu``, ``gelu``, ``gelu_tanh`` or ``swigluoai`` where the gate is exactly that, else ``None``."""
    load: Callable[[], nn.Module] = field(repr=False, compare=False)
    """Gives `module`; a host whose kernel does without never calls it, and never imports transformers."""

    @property
    def module(self) -> nn.Module:
        """The model's experts module on the meta device: read it, never run it."""
        return self.load()

    def loaded(self) -> ExpertMaths:
        """The same with its module at hand, which needs the model's folder no more."""
        module = self.module
        return replace(self, load=lambda: module)

    @property
    def up_rows(self) -> int:
        """Output width of the first matrix: gate and up together, or up alone."""
        return 2 * self.intermediate if self.has_gate else self.intermediate

    def activate(self, up_SU: torch.Tensor) -> torch.Tensor:
        """Gate or activation between the two matrices: [pairs, up_rows] → [pairs, intermediate]."""
        if self.has_gate:
            return self.module._apply_gate(up_SU)  # type: ignore[operator]
        return self.module.act_fn(up_SU)  # type: ignore[operator]

    def instantiate(self, parameters: Mapping[str, torch.Tensor], num_experts: int) -> nn.Module:
        """The model's experts module over other ``parameters`` (name → [num_experts, ...])."""
        module = copy.copy(self.module)
        # A shallow copy shares its dictionaries with the original, which must stay on the meta device.
        module._parameters = {
            name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()
        }
        module._buffers = dict(self.module._buffers)
        setattr(module, "num_experts", num_experts)  # noqa: B010, a plain int beside typed submodules
        return module


_FACTS: Final = frozenset(entry.name for entry in fields(ExpertMaths)) - {"load"}


def layer_maths(checkpoint: Checkpoint, layer: int) -> ExpertMaths:
    """What the experts of ``layer`` compute.

    Builds the whole model on the meta device once per process (0.1 to 1 s measured for 36 to 61 layers, and 2 s for
    importing transformers), or finds in the cache what that gave before. Raises CheckpointError if transformers
    does not know the model or keeps its experts in another way.
    """
    checkpoint.layout(layer)  # raises for a layer without experts
    path, digest = checkpoint.path.as_posix(), checkpoint.digest

    def load() -> nn.Module:
        module = _experts_modules(path, digest).get(layer)
        if module is None:
            raise CheckpointError(
                f"{checkpoint.path}: transformers keeps the experts of layer {layer} of "
                f"{checkpoint.model_type!r} in a class of their own",
                "supported are the models whose experts can be run by another implementation",
            )
        return module

    known = known_facts(digest)
    facts = known.get(layer)
    if facts is None or facts.keys() != _FACTS:
        facts = _facts(load())
        remember_facts(digest, {**known, layer: facts})
    return ExpertMaths(**facts, load=load)


def inspect_module(module: nn.Module) -> ExpertMaths:
    """Read flags and sizes off an experts module. Raises CheckpointError for parameters of unknown names."""
    return ExpertMaths(**_facts(module), load=lambda: module)


def _facts(module: nn.Module) -> dict[str, Any]:
    """All of an ExpertMaths but the module."""
    has_gate, has_bias = bool(module.has_gate), bool(module.has_bias)
    known = {name + suffix for name in _WEIGHTS for suffix in (("", "_bias") if has_bias else ("",))}
    unknown = sorted({name for name, _ in module.named_parameters()} - known)
    if unknown:
        raise CheckpointError(
            f"{type(module).__name__} has parameters of no known layout: {', '.join(unknown)}"
        )
    down = module.down_proj
    assert isinstance(down, torch.Tensor)
    is_transposed = bool(module.is_transposed)
    intermediate, hidden = down.shape[1:] if is_transposed else reversed(down.shape[1:])
    return {
        "hidden": hidden,
        "intermediate": intermediate,
        "has_gate": has_gate,
        "has_bias": has_bias,
        "is_transposed": is_transposed,
        "is_concatenated": bool(module.is_concatenated),
        "activation": _identify_gate(module) if has_gate else None,
    }


@lru_cache(maxsize=4)
def _experts_modules(path: str, digest: str) -> Mapping[int, nn.Module]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
        factory = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        # Initialising costs nothing here; switching it off would do so for the whole process, whatever
        # another thread builds meanwhile.
        with torch.device("meta"):
            model = factory.from_config(config)
    except (ValueError, KeyError, ImportError, OSError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot build this model: {error}",
            "a newer transformers may know it",
        ) from error
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match and all(hasattr(module, flag) for flag in _FLAGS):
            modules.setdefault(int(match[1]), module)
    return modules


def _identify_gate(module: nn.Module) -> str | None:
    """Name the gate by what it computes, so that a custom one never passes for a plain one."""
    # In float64: two ways to round gelu's tail differ by more than gelu and its approximation should.
    grids = torch.linspace(-150, 150, 61), torch.linspace(-9, 9, 67)
    values = torch.cat(grids).double()
    gate, up = (grid.reshape(-1, 64) for grid in torch.meshgrid(values, values.flip(0), indexing="ij"))
    halves = torch.cat([gate, up], dim=-1)
    alternating = torch.stack([gate, up], dim=-1).flatten(-2)
    clamped = gate.clamp(max=7.0)
    candidates = {
        "silu": (halves, functional.silu(gate) * up),
        "gelu": (halves, functional.gelu(gate) * up),
        "gelu_tanh": (halves, functional.gelu(gate, approximate="tanh") * up),
        "swigluoai": (alternating, (up.clamp(-7, 7) + 1) * clamped * torch.sigmoid(1.702 * clamped)),
    }
    for name, (gate_up, expected) in candidates.items():
        if module.is_concatenated != (gate_up is halves):
            continue
        actual = module._apply_gate(gate_up)  # type: ignore[operator]
        if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9, atol=1e-9):
            return name
    return None
