"""What learning is compared with: low-rank adapters, and a penalty on what mattered before.

Shape suffixes: O, I = rows and columns of a matrix, R = rank, E = experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from actors.text_routing import expert_modules
from actors.whole_weights import WholeWeights

_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRank:
    """W + scale * B A for every attention matrix and every expert (Hu et al., "LoRA", 2021).

    The model computes with the sum, so that nothing in it is changed; see `actors.expert_training.Weights`.
    """

    def __init__(self, model: nn.Module, rank: int = 8, scale: float = 2.0) -> None:
        """All but the adapters is frozen."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._held = {
            f"{name}.weight": module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _MATRICES
        }
        for layer, experts in expert_modules(model).items():
            self._held |= {f"{layer}.{name}": p for name, p in experts.named_parameters(recurse=False)}
        self._scale = scale / 1.0
        self._before = {name: held.data.clone() for name, held in self._held.items()}
        self.masters: dict[tuple[str, str], nn.Parameter] = {}
        for name, held in self._held.items():
            held.requires_grad_(True)
            *stack, rows, columns = held.shape
            a = torch.randn(*stack, rank, columns, device=held.device) / columns**0.5
            self.masters[name, "A"] = nn.Parameter(a)
            self.masters[name, "B"] = nn.Parameter(torch.zeros(*stack, rows, rank, device=held.device))
        self._all = sum(parameter.numel() for parameter in model.parameters())

    @property
    def share(self) -> float:
        """Of all the model's weights: those of the adapters."""
        return sum(master.numel() for master in self.masters.values()) / self._all

    def take_gradients(self) -> None:
        """By the chain rule, from those of the sums."""
        for name, held in self._held.items():
            assert held.grad is not None
            grad_OI = held.grad.float() * self._scale
            a_RI, b_OR = self.masters[name, "A"], self.masters[name, "B"]
            a_RI.grad, b_OR.grad = b_OR.data.mT @ grad_OI, grad_OI @ a_RI.data.mT
            held.grad = None

    def write(self) -> None:
        """Have the model compute with the sums."""
        for name, held in self._held.items():
            delta_OI = self.masters[name, "B"].data @ self.masters[name, "A"].data
            held.data.copy_(self._before[name].float() + self._scale * delta_OI)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within the block there are no adapters."""
        for name, held in self._held.items():
            held.data.copy_(self._before[name])
        try:
            yield
        finally:
            self.write()

    def state(self) -> dict[str, torch.Tensor]:
        """The adapters."""
        return {f"{name}.{which}": master.data.clone() for (name, which), master in self.masters.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take them up again."""
        for (name, which), master in self.masters.items():
            master.data.copy_(state[f"{name}.{which}"])
        self.write()


class Anchored(WholeWeights):
    """All weights, each drawn back to where it was by how much it mattered then (Kirkpatrick et al., 2017: EWC)."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], weight: float) -> None:
        super().__init__(model, parameters, remember=False)
        self._weight = weight
        self.importance: dict[str, torch.Tensor] = {}
        """Diagonal of the Fisher information, summed over what was learnt."""
        self._anchors: dict[str, torch.Tensor] = {}

    def take_gradients(self) -> None:
        """Those of the text, and of the penalty."""
        super().take_gradients()
        for name, importance in self.importance.items():
            master = self.masters[name]
            assert master.grad is not None
            master.grad.add_(importance * (master.data - self._anchors[name]), alpha=self._weight)

    def remember(self, model: nn.Module, rows: Iterable[list[int]]) -> int:
        """What is learnt now matters, by the squared gradients of some rows; tokens that this took."""
        device, count, tokens = next(model.parameters()).device, 0, 0
        found = {name: torch.zeros_like(master.data) for name, master in self.masters.items()}
        for row in rows:
            ids_1T = torch.tensor([row], device=device)
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
            F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").backward()
            WholeWeights.take_gradients(self)
            for name, master in self.masters.items():
                assert master.grad is not None
                found[name].addcmul_(master.grad, master.grad)
            count, tokens = count + 1, tokens + len(row)
        for name, squares in found.items():
            mean = squares / max(1, count)
            self.importance[name] = mean + self.importance[name] if name in self.importance else mean
            self._anchors[name] = self.masters[name].data.clone()
        return tokens
