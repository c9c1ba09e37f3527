"""Expert parallelism in training: each worker has some of every layer's experts, and tokens go to where they are.

Rows of a step are divided over workers, so is every layer's set of experts. A token's hidden state is sent to the
workers of its experts and what these make of it comes back, as in GShard (Lepikhin et al., 2020). In the backward pass
gradients go the same ways, so those of an expert come together where it is and are sent nowhere else.

All workers meet in every layer's exchanges, forward and backward, whether or not they have something to send.

Shape suffixes: T = tokens of this worker, K = top-k, N = rows that are sent or received, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from actors.expert_slices import DOWN, GATE_UP
from actors.text_routing import expert_modules

Places = Mapping[int, Mapping[int, int]]
"""Layer index → expert → its place among those that this worker has of the layer."""


def owners(
    sizes: Mapping[int, int], chosen: Sequence[tuple[int, int]], workers: int
) -> dict[int, tuple[int, ...]]:
    """Layer index → the worker of each of its experts: the chosen dealt out evenly, the others so as to even it out.

    `sizes`: layer index → number of experts; `chosen`: (layer, expert) of those that are trained.
    """
    found: dict[int, list[int]] = {layer: [-1] * size for layer, size in sizes.items()}
    for number, (layer, expert) in enumerate(sorted(set(chosen))):
        found[layer][expert] = number % workers
    for of_experts in found.values():
        for expert, worker in enumerate(of_experts):
            if worker < 0:
                of_experts[expert] = min(range(workers), key=lambda one: (of_experts.count(one), one))
    return {layer: tuple(of_experts) for layer, of_experts in found.items()}


def divide_experts(model: nn.Module, of_worker: Mapping[int, Sequence[int]], rank: int) -> Places:
    """Leave a worker's model the experts that are its own, and have its tokens sent to the others'.

    `of_worker`: see `owners`. Whoever counts experts by `num_experts` still sees all of a layer.
    """
    found: dict[int, dict[int, int]] = {}
    for layer, module in expert_modules(model).items():
        mine = [expert for expert, worker in enumerate(of_worker[layer]) if worker == rank]
        found[layer] = {expert: place for place, expert in enumerate(mine)}
        for name in (GATE_UP, DOWN):
            setattr(module, name, nn.Parameter(getattr(module, name).data[mine], requires_grad=False))
        module.forward = _Divided(module, of_worker[layer])
    return found


class _Divided:
    """Stands in for the forward pass of a layer's experts."""

    def __init__(self, module: Any, workers: Sequence[int]) -> None:
        """`workers`: of each expert."""
        self._module, self._compute = module, module.forward
        self._worker_E = torch.tensor(workers)
        places, counts = [], [0] * dist.get_world_size()
        for worker in workers:
            places.append(counts[worker])
            counts[worker] += 1
        self._place_E, self._mine = torch.tensor(places), counts[dist.get_rank()]

    def __call__(
        self, hidden_TH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        chosen_N = top_k_index.reshape(-1)
        worker_N = self._worker_E.to(chosen_N.device)[chosen_N]
        order_N = torch.argsort(worker_N, stable=True)
        sent = torch.bincount(worker_N, minlength=dist.get_world_size())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        there, back = sent.tolist(), received.tolist()
        places_N = torch.empty(sum(back), dtype=torch.int64, device=chosen_N.device)
        dist.all_to_all_single(places_N, self._place_E.to(chosen_N.device)[chosen_N[order_N]], back, there)
        token_N = order_N // top_k_index.shape[1]
        rows_NH = _exchanged(hidden_TH[token_N], there, back)
        made_NH = _exchanged(self._computed(rows_NH, places_N), back, there)
        weighted_NH = made_NH * top_k_weights.reshape(-1)[order_N, None].to(made_NH.dtype)
        return torch.zeros_like(hidden_TH).index_add(0, token_N, weighted_NH.to(hidden_TH.dtype))

    def _computed(self, rows_NH: torch.Tensor, places_N: torch.Tensor) -> torch.Tensor:
        """Each row by one of this worker's own experts."""
        if not len(rows_NH):
            return rows_NH
        module, all_of_layer = self._module, self._module.num_experts
        module.num_experts = self._mine
        try:
            ones_N1 = torch.ones(len(rows_NH), 1, dtype=rows_NH.dtype, device=rows_NH.device)
            found: torch.Tensor = self._compute(rows_NH, places_N[:, None], ones_N1)
            return found
        finally:
            module.num_experts = all_of_layer


def _exchanged(rows_NH: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """Rows of all workers that are for this one, in the order of workers; `sent` to each, `received` of each."""
    # It needs a gradient on every worker or on none: who left the backward pass out would leave the others waiting.
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
    found: torch.Tensor = _Exchange.apply(rows_NH, anchor, sent, received)  # type: ignore[no-untyped-call]
    return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, rows_NH: torch.Tensor, anchor: torch.Tensor, sent: list[int], received: list[int]
    ) -> torch.Tensor:
        context.ways = sent, received
        return _sent(rows_NH, sent, received)

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sent, received = context.ways
        return _sent(grads[0], received, sent), None, None, None


def _sent(rows_NH: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    found_NH = rows_NH.new_empty(sum(received), rows_NH.shape[1])
    dist.all_to_all_single(found_NH, rows_NH.contiguous(), received, sent)
    return found_NH
