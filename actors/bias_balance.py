"""Balance without a loss: a bias of each expert that only the choice sees, moved a little after each step.

Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024: an expert that was chosen less
often than the mean of its layer gets a larger bias, one that was chosen more often a smaller one. It is for routers
that have such a bias (DeepSeek-V3's kind); what serves them adds it as it is.

Letters: E = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from actors.expert_slices import DTYPES
from actors.text_routing import expert_modules, router_modules
from cluster.checkpoint import Checkpoint
from cluster.versions.growth import routers

_BIAS: Final = "e_score_correction_bias"


class BiasBalance:
    """Of a model's routers that have a bias; of one without it does nothing."""

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        total: Callable[[Sequence[torch.Tensor]], None] = lambda tensors: None,
    ) -> None:
        """`rate`: by which a bias moves in a step; `total`: see `actors.expert_training.Training`."""
        self._rate, self._total = rate, total
        self._bias = {
            layer: getattr(router, _BIAS)
            for layer, router in router_modules(model).items()
            if isinstance(getattr(router, _BIAS, None), torch.Tensor)
        }
        self._before = {layer: bias.detach().clone() for layer, bias in self._bias.items()}
        self._chosen = {layer: torch.zeros(len(bias)) for layer, bias in self._bias.items()}
        experts = expert_modules(model)
        for layer in self._bias:
            experts[layer].register_forward_pre_hook(self._hears(layer), with_kwargs=True)

    def nudge(self) -> None:
        """After a step: move biases by what was chosen in it, by all workers together."""
        counts = list(self._chosen.values())
        self._total(counts)
        for (layer, bias_E), chosen_E in zip(self._bias.items(), counts, strict=True):
            if chosen_E.sum() > 0:
                bias_E.add_(self._rate * torch.sign(chosen_E.mean() - chosen_E).to(bias_E))
            self._chosen[layer] = torch.zeros_like(chosen_E)

    def state(self) -> dict[str, torch.Tensor]:
        """The biases, to be put down."""
        return {str(layer): bias.clone() for layer, bias in self._bias.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take them up again."""
        for layer, bias in self._bias.items():
            bias.copy_(state[str(layer)])

    def round_to(self, checkpoint: Checkpoint) -> None:
        """Have them be numbers that the checkpoint's dtypes can hold."""
        for name, layer in _names(checkpoint).items():
            bias = self._bias[layer]
            bias.copy_(bias.to(DTYPES[checkpoint.tensors[name].dtype]))

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """By the checkpoint's names and in its dtypes."""
        return {
            name: self._bias[layer].detach().to(DTYPES[checkpoint.tensors[name].dtype]).cpu().clone()
            for name, layer in _names(checkpoint).items()
        }

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within the block they are what they were when this began."""
        now = self.state()
        self.load({str(layer): bias for layer, bias in self._before.items()})
        try:
            yield
        finally:
            self.load(now)

    def _hears(self, layer: int) -> Any:
        def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A pass in which nothing is learnt, of the version before, is nobody's load.
            if torch.is_grad_enabled():
                chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
                counts = self._chosen[layer]
                counts += torch.bincount(chosen.reshape(-1).cpu(), minlength=len(counts))

        return hear


def _names(checkpoint: Checkpoint) -> dict[str, int]:
    """Name of a bias in a checkpoint → its layer."""
    found = {name.removesuffix("weight") + _BIAS: layer for name, layer in routers(checkpoint).items()}
    return {name: layer for name, layer in found.items() if name in checkpoint.tensors}
