"""The experts that are trained, out of a transformers model of which all else is frozen.

transformers keeps all experts of a layer in one tensor. What is trained are copies of single experts in float32
(masters): gradients are cut out of the layer's, and the masters written back after each step, so that the optimiser
knows nothing of the experts that stay, and what was before can be put in its place for the length of a block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from actors.text_routing import expert_modules
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError

GATE_UP: Final = "gate_up_proj"
DOWN: Final = "down_proj"
DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_FIRST: Final = re.compile(r"experts\.0\.")


class Slice(NamedTuple):
    """One tensor of one expert."""

    layer: int
    expert: int
    tensor: str


class ChosenExperts:
    """Of one model, which must be in training for as long as this is used by nobody else."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Collection[tuple[int, int]],
        places: Mapping[int, Mapping[int, int]] | None = None,
    ) -> None:
        """`chosen`: (layer, expert). All else is frozen. `places`: of a worker's own experts, where it has not all of
        them (`actors.expert_parallel`); the chosen that are others' are left to them.

        LearningError for an expert that the model does not have, or if its experts are of a layout that is not known.
        """
        modules = expert_modules(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.masters: dict[Slice, nn.Parameter] = {}
        self._held: dict[Slice, nn.Parameter] = {}
        self._before: dict[Slice, torch.Tensor] = {}
        self._places: dict[Slice, int] = {}
        self._partly = places is not None
        self._all = sum(parameter.numel() for parameter in model.parameters())
        for layer, expert in sorted(set(chosen)):
            module = modules.get(layer)
            if module is None or not 0 <= expert < int(module.num_experts):
                raise LearningError(
                    f"the model has no expert {expert} in layer {layer}", "choose again, with this model"
                )
            _check(module, layer)
            place = expert if places is None else places[layer].get(expert)
            if place is None:
                continue
            for name in (GATE_UP, DOWN):
                held = getattr(module, name)
                held.requires_grad_(True)
                key = Slice(layer, expert, name)
                self._held[key], self._places[key] = held, place
                self._before[key] = held.data[place].clone()
                self.masters[key] = nn.Parameter(held.data[place].float().clone())
        if not self.masters:
            raise LearningError(
                "no expert is chosen, so that nothing can be learnt", "choose with a larger reach"
            )

    @property
    def share(self) -> float:
        """Of all the model's weights that are trained."""
        return sum(master.numel() for master in self.masters.values()) / self._all

    def take_gradients(self) -> None:
        """Give each master its part of the gradients, and the model's back."""
        for key, master in self.masters.items():
            grad = self._held[key].grad
            master.grad = None if grad is None else grad[self._places[key]].float().clone()
        for held in self._held.values():
            held.grad = None

    def write(self) -> None:
        """Have the model compute with what the masters are now."""
        self._put({key: master.data for key, master in self.masters.items()})

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within the block the model computes as it did when this began."""
        self._put(self._before)
        try:
            yield
        finally:
            self.write()

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """What was trained, by the checkpoint's names and in its dtypes, as `expertmesh versions publish` takes it.

        LearningError if the checkpoint keeps experts in a layout that is not known here.
        """
        found: dict[str, torch.Tensor] = {}
        for layer, expert in sorted({(key.layer, key.expert) for key in self.masters}):
            layout = checkpoint.layout(layer)
            if layout.fused or set(layout.parts) != {"gate", "up", "down"}:
                raise LearningError(
                    f"{checkpoint.path} keeps experts in a layout that can't be written yet",
                    "one with a gate, an up and a down projection for each expert is expected",
                )
            gate, up = self.masters[Slice(layer, expert, GATE_UP)].data.chunk(2)
            parts = {"gate": gate, "up": up, "down": self.masters[Slice(layer, expert, DOWN)].data}
            for part, tensor in parts.items():
                first = layout.tensor_name(part, 0)
                # One that was added is named as if the checkpoint had it.
                name = _FIRST.sub(f"experts.{expert}.", first)
                found[name] = tensor.to(DTYPES[checkpoint.tensors[first].dtype]).contiguous()
        return found

    def round_to(self, checkpoint: Checkpoint) -> None:
        """Have the masters be numbers that the checkpoint's dtypes can hold: those that will serve."""
        for (layer, _, name), master in self.masters.items():
            layout = checkpoint.layout(layer)
            part = "down" if name == DOWN else next(part for part in layout.parts if part != "down")
            dtype = DTYPES[checkpoint.tensors[layout.tensor_name(part, 0)].dtype]
            master.data.copy_(master.data.to(dtype))
        self.write()

    def state(self) -> dict[str, torch.Tensor]:
        """The masters, to be put down."""
        return {_written(key): master.data.clone() for key, master in self.masters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the masters up again, of all workers' those that are here. LearningError if they are of others."""
        mine = {_written(key) for key in self.masters}
        if not (mine <= state.keys() if self._partly else mine == state.keys()):
            raise LearningError("the checkpoint of the training is of other experts", "begin anew")
        for key, master in self.masters.items():
            master.data.copy_(state[_written(key)])
        self.write()

    def _put(self, values: Mapping[Slice, torch.Tensor]) -> None:
        with torch.no_grad():
            for key, value in values.items():
                self._held[key].data[self._places[key]].copy_(value)


def _check(module: Any, layer: int) -> None:
    plain = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    if not plain or getattr(module, "has_bias", False) or not hasattr(module, GATE_UP):
        raise LearningError(
            f"the experts of layer {layer} are of a layout that can't be trained yet",
            "gated ones without biases, gate before up, are expected",
        )


def _written(key: Slice) -> str:
    return f"{key.layer}.{key.expert}.{key.tensor}"
