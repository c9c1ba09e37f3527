"""The policy `reroute`: the model's router chooses among the experts that live.

Each layer's router gets a mask added to its logits, zero for experts that can be asked and the lowest number for
those that can't: top-k then finds the router's next choices, and the weights are normalised over what it chose.
Only engines of that policy have it, since it is part of the compiled model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index

from actors.route import NOBODY, Owners
from cluster.errors import CheckpointError

_LOWEST = torch.finfo(torch.float32).min / 2


class MaskedRouter:
    """A router of vLLM's whose logits have `mask` [E] added; all else is the inner one's."""

    def __init__(self, inner: Any, mask: torch.Tensor) -> None:
        self.inner = inner
        self.mask = mask

    def select_experts(self, *, router_logits: torch.Tensor, **others: Any) -> Any:
        """As the inner one's."""
        masked = (router_logits.float() + self.mask).clamp(min=_LOWEST).to(router_logits.dtype)
        return self.inner.select_experts(router_logits=masked, **others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def install(model: nn.Module) -> dict[int, torch.Tensor]:
    """Put a mask before every MoE layer's router; the masks by layer.

    CheckpointError for a router whose choice is biased: one that was masked could still be chosen.
    """
    masks = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            continue
        if getattr(module.router, "e_score_correction_bias", None) is not None:
            raise CheckpointError(
                f"{name} chooses experts by biased scores, which can't be kept off missing ones",
                "set placement.no_replica to fail or drop",
            )
        device = next(model.parameters()).device
        mask = torch.zeros(module.routed_experts.global_num_experts, device=device)
        module.router = MaskedRouter(module.router, mask)  # type: ignore[assignment]  # vLLM asks by method
        masks[extract_layer_index(name)] = mask
    return masks


def keep_off(masks: Mapping[int, torch.Tensor], owners: Mapping[int, Owners]) -> bool:
    """Set the masks for who owns what now; whether any expert is kept off."""
    any_missing = False
    for layer, of_layer in owners.items():
        mask = masks[layer]
        # Behind them are other versions of the same experts, on the same hosts.
        missing = [expert for expert, owner in enumerate(of_layer.listed[: len(mask)]) if owner == NOBODY]
        mask.zero_()
        if missing:
            mask[missing] = _LOWEST
            any_missing = True
    return any_missing
