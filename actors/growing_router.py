"""Routers that versions may make longer or shorter: room for further experts, and a mask over all of them.

vLLM's router has as many rows as the checkpoint has experts, for good. Rows of further experts are kept beside it, and
their logits put behind its own; the mask, zero for experts that the version has and the lowest number for all others,
keeps top-k off the rest. Only engines with `versions.spare_experts` have it, since it is part of the compiled model.

Shape suffixes: T = tokens, H = hidden size, E = experts of the checkpoint, S = spare ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.errors import CheckpointError

_LOWEST = torch.finfo(torch.float32).min / 2


class GrowingRouter:
    """A router of vLLM's with room for more experts; all else is the inner one's."""

    def __init__(self, inner: Any, rows_SH: torch.Tensor, mask: torch.Tensor) -> None:
        self.inner = inner
        self.rows_SH = rows_SH
        self.mask = mask
        """float32 [E + S]."""

    def select_experts(
        self, *, hidden_states: torch.Tensor, router_logits: torch.Tensor, **others: Any
    ) -> Any:
        """As the inner one's, among the experts that the mask leaves."""
        more = torch.nn.functional.linear(hidden_states, self.rows_SH)
        logits = torch.cat((router_logits, more.to(router_logits.dtype)), dim=1)
        masked = (logits.float() + self.mask).clamp(min=_LOWEST).to(router_logits.dtype)
        return self.inner.select_experts(hidden_states=hidden_states, router_logits=masked, **others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a version changes in one layer's router, in place."""

    size: int
    """Experts of the checkpoint."""
    rows_SH: torch.Tensor
    mask: torch.Tensor

    def use(self, more_kH: torch.Tensor | None, retired: Collection[int]) -> None:
        """Have these rows behind the checkpoint's, none for None, and keep off retired experts and those that are not
        there.

        CheckpointError if there is no room for so many.
        """
        count = 0 if more_kH is None else len(more_kH)
        if count > len(self.rows_SH):
            raise CheckpointError(
                f"a version has {count} experts more than the checkpoint, there is room for {len(self.rows_SH)}",
                f"start with versions.spare_experts: {count}",
            )
        self.mask.zero_()
        if more_kH is not None:
            self.rows_SH[:count].copy_(more_kH)
        self.mask[self.size + count :] = _LOWEST
        self.mask[list(retired)] = _LOWEST


def install(model: nn.Module, spare: int) -> dict[int, Rows]:
    """Give every MoE layer's router room for so many more experts; by layer, what there is to set.

    CheckpointError for a router that chooses among its experts in another way than by the highest logits.
    """
    # Here, so that the rest can be tested without vLLM's 20 seconds of import.
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.utils import extract_layer_index

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoERunner):
            check(name, module.router)
            layer = module.routed_experts
            parameter = next(model.parameters())
            rows = Rows(
                layer.global_num_experts,
                torch.zeros(spare, layer.hidden_size, device=parameter.device, dtype=parameter.dtype),
                torch.zeros(layer.global_num_experts + spare, device=parameter.device),
            )
            rows.use(None, ())
            module.router = GrowingRouter(module.router, rows.rows_SH, rows.mask)  # type: ignore[assignment]  # vLLM asks by method
            found[extract_layer_index(name)] = rows
    return found


def check(name: str, router: Any) -> None:
    """CheckpointError if a router's choice can't be among more experts, or fewer; `name` is its layer's."""
    grouped = (
        getattr(router, "use_grouped_topk", True) and (getattr(router, "num_expert_group", None) or 1) > 1
    )
    own = ("custom_routing_function", "_hash_indices_table", "zero_expert_type", "e_score_correction_bias")
    if grouped or any(getattr(router, it, None) is not None for it in own):
        raise CheckpointError(
            f"{name} chooses experts by groups, by biased scores or in a way of its own, which can't be had with other "
            "numbers of them",
            "leave versions.spare_experts at 0",
        )


def use(
    rows: Mapping[int, Rows], more: Mapping[int, torch.Tensor], retired: Mapping[int, Collection[int]]
) -> None:
    """Set every layer's router: further rows, and experts to be kept off, of those that have such."""
    for layer, of_layer in rows.items():
        of_layer.use(more.get(layer), retired.get(layer, ()))
