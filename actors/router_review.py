"""What learning does to routers: a row for each clone, and a short review in which routers alone learn.

A clone's row is its original's and a direction in which new text lies and old text does not, so that new text finds the
clone first and old text stays with the original. The review follows MoE-LPR (Zhou et al., 2024): after experts were
trained, routers alone learn from old and new text, so that each goes to where it is known best. Beside that the
auxiliary loss of Switch Transformers (Fedus et al., 2021) keeps experts from being left alone.

Shape suffixes: N = tokens, H = hidden size, E = experts, K = top-k.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from actors.expert_slices import DOWN, DTYPES, GATE_UP
from actors.text_routing import batches, expert_modules
from actors.trainable_version import add_expert, router_modules
from actors.whole_weights import WholeWeights
from cluster.checkpoint import Checkpoint
from cluster.versions.growth import routers

# Tokens of each side that a clone's row is found from.
_MOST_TOKENS: Final = 16_384
# Of the ridge regression, as a share of the mean of the squared features.
_RIDGE: Final = 0.1


def clone_rows(
    model: nn.Module,
    originals: Collection[tuple[int, int]],
    new: Sequence[Sequence[int]],
    old: Sequence[Sequence[int]],
    margin: float = 6.0,
) -> dict[tuple[int, int], torch.Tensor]:
    """(Layer, expert) → the row [H] of the router with which a copy of it is preferred by new text and avoided by old.

    `new`, `old`: texts as token numbers; `margin`: by how much, in standard deviations of the router's logits.
    """
    if not originals:
        return {}
    inputs = [_router_inputs(model, texts) for texts in (new, old)]
    routers = router_modules(model)
    found: dict[tuple[int, int], torch.Tensor] = {}
    for layer, expert in sorted(originals):
        new_NH, old_NH = inputs[0][layer], inputs[1][layer]
        weight_EH = routers[layer].weight.data.float()
        spread = float((torch.cat((new_NH, old_NH)) @ weight_EH.T).std(dim=-1).mean())
        found[layer, expert] = weight_EH[expert] + direction(new_NH, old_NH) * margin * spread
    return found


def add_clones(model: nn.Module, rows: Mapping[tuple[int, int], torch.Tensor]) -> dict[tuple[int, int], int]:
    """Have a copy of each of these experts (layer, expert) with this row of the router; the copies' numbers."""
    found: dict[tuple[int, int], int] = {}
    for (layer, expert), row_H in sorted(rows.items()):
        module = expert_modules(model)[layer]
        tensors = {name: getattr(module, name).data[expert] for name in (GATE_UP, DOWN)}
        found[layer, expert] = add_expert(model, layer, row_H, tensors)
    return found


def direction(new_NH: torch.Tensor, old_NH: torch.Tensor) -> torch.Tensor:
    """What, multiplied with new rows, is near 1 and with old rows near -1: ridge regression without a constant."""
    grams, sides = [], []
    for rows_NH, wanted in ((new_NH, 1.0), (old_NH, -1.0)):
        # Each side weighs the same, however many rows it has.
        grams.append(rows_NH.T @ rows_NH / len(rows_NH))
        sides.append(wanted * rows_NH.mean(dim=0))
    gram_HH = (grams[0] + grams[1]) / 2
    ridge = _RIDGE * gram_HH.diagonal().mean()
    eye_HH = torch.eye(len(gram_HH), device=gram_HH.device)
    found: torch.Tensor = torch.linalg.solve(gram_HH + ridge * eye_HH, (sides[0] + sides[1]) / 2)
    return found


def router_weights(model: nn.Module) -> WholeWeights:
    """All routers of a model, to be trained."""
    return WholeWeights(model, {f"{layer}": router.weight for layer, router in router_modules(model).items()})


def reviewed(model: nn.Module, checkpoint: Checkpoint, state: Mapping[str, Any]) -> WholeWeights:
    """Have a model's routers be what a review came to, as the checkpoint's dtypes can hold it."""
    dtypes = {layer: DTYPES[checkpoint.tensors[name].dtype] for name, layer in routers(checkpoint).items()}
    weights = router_weights(model)
    weights.load(
        {layer: tensor.to(dtypes[int(layer)]).to(tensor.dtype) for layer, tensor in state["masters"].items()}
    )
    return weights


def router_tensors(
    model: nn.Module, checkpoint: Checkpoint, layers: Collection[int]
) -> dict[str, torch.Tensor]:
    """Whole routers of some layers, by the checkpoint's names and in its dtypes."""
    modules = router_modules(model)
    return {
        name: modules[layer].weight.data.to(DTYPES[checkpoint.tensors[name].dtype]).contiguous()
        for name, layer in routers(checkpoint).items()
        if layer in layers
    }


class Balance:
    """The auxiliary loss of all layers: E times the sum over experts of share of choices times mean probability."""

    def __init__(self, model: nn.Module, weight: float) -> None:
        """`weight`: of the mean over layers."""
        self._routers, self._experts = router_modules(model), expert_modules(model)
        self._weight = weight
        self._logits: dict[int, torch.Tensor] = {}
        self._chosen: dict[int, torch.Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block forward passes are listened to."""
        hooks = self.watch()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def watch(self) -> list[Any]:
        """From now on forward passes are listened to; hooks that can be removed."""
        hooks = [
            router.register_forward_pre_hook(self._hears_input(layer))
            for layer, router in self._routers.items()
        ]
        return hooks + [
            experts.register_forward_pre_hook(self._hears_choice(layer), with_kwargs=True)
            for layer, experts in self._experts.items()
        ]

    def __call__(self) -> torch.Tensor | None:
        """Of the last forward pass, which is forgotten; None if there was none."""
        if not self._logits:
            return None
        losses = []
        for layer, logits_NE in self._logits.items():
            size = logits_NE.shape[1]
            share_E = (
                torch.bincount(self._chosen[layer].reshape(-1), minlength=size) / self._chosen[layer].numel()
            )
            losses.append(size * (share_E * F.softmax(logits_NE.float(), dim=-1).mean(dim=0)).sum())
        self._logits, self._chosen = {}, {}
        return self._weight * torch.stack(losses).mean()

    def _hears_input(self, layer: int) -> Any:
        def hear(router: Any, args: tuple[Any, ...]) -> None:
            rows_NH = args[0].reshape(-1, args[0].shape[-1])
            self._logits[layer] = F.linear(rows_NH, router.weight)

        return hear

    def _hears_choice(self, layer: int) -> Any:
        def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._chosen[layer] = args[1] if len(args) > 1 else kwargs["top_k_index"]

        return hear


def _router_inputs(model: nn.Module, texts: Sequence[Sequence[int]]) -> dict[int, torch.Tensor]:
    """Layer index → float32 [N, H] of what its router sees for these texts."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in router_modules(model)}

    def keep(layer: int) -> Any:
        def hear(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[layer].append(args[0].detach().reshape(-1, args[0].shape[-1]).float())

        return hear

    hooks = [router.register_forward_pre_hook(keep(layer)) for layer, router in router_modules(model).items()]
    count = 0
    try:
        with torch.inference_mode():
            for ids_BT in batches(texts):
                if count >= _MOST_TOKENS:
                    break
                model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)
                count += ids_BT.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(rows).clone() for layer, rows in found.items()}
