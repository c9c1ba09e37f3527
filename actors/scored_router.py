"""The capacity's policy `reroute`: the router's logits come along with its choice, so that a next one can be made.

The logits are columns behind the weights, [T, K + E], and so reach the op as data of the graph. A buffer beside it,
filled by another op, would leave the compiler free to order the two as it likes. Only engines of that policy have
it, since it is part of the compiled model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.errors import CheckpointError
from cluster.gate import Gate


class ScoredRouter:
    """A router of vLLM's whose weights [T, K] are followed by its logits [T, E]; all else is the inner one's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def select_experts(self, *, router_logits: torch.Tensor, **others: Any) -> Any:
        """As the inner one's."""
        weights, ids = self.inner.select_experts(router_logits=router_logits, **others)
        return torch.cat((weights.float(), router_logits.float()), dim=1), ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def install(model: nn.Module) -> dict[int, Gate]:
    """Have every MoE layer's router bring its logits; how each layer chooses.

    CheckpointError for a router whose way of choosing is not known.
    """
    # Here, so that the rest can be tested without vLLM's 20 seconds of import.
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.utils import extract_layer_index

    gates = {}
    for name, module in model.named_modules():
        if isinstance(module, MoERunner):
            gates[extract_layer_index(name)] = gate_of(name, module.router)
            module.router = ScoredRouter(module.router)  # type: ignore[assignment]  # vLLM asks by method
    return gates


def gate_of(name: str, router: Any) -> Gate:
    """How a router of vLLM's chooses; `name` is its layer's, for the error."""
    scoring = getattr(router, "scoring_func", "softmax")
    own = ("custom_routing_function", "_hash_indices_table", "zero_expert_type")
    if scoring not in ("softmax", "sigmoid") or any(getattr(router, it, None) is not None for it in own):
        raise CheckpointError(
            f"{name} chooses experts in a way of its own, whose next choice is not known",
            "set placement.capacity.policy to defer, drop or dropless",
        )
    bias = getattr(router, "e_score_correction_bias", None)
    grouped = getattr(router, "use_grouped_topk", True) and getattr(router, "num_expert_group", None)
    return Gate(
        scoring,
        renormalize=bool(router.renormalize),
        bias=None if bias is None else bias.detach().float().cpu().numpy().astype(np.float32),
        groups=int(router.num_expert_group) if grouped else 1,
        top_groups=int(router.topk_group) if grouped else 1,
    )
