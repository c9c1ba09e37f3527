"""Which experts a model's routers choose for some texts, counted with transformers, apart from what serves.

Shape suffixes: B = texts, T = tokens, K = top-k.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any, Final

import torch
from torch import nn

from cluster.errors import LearningError

# Texts that are run together.
_BATCH: Final = 16
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:[a-z0-9_]+\.)*experts$")


def choices(model: nn.Module, texts: Iterable[Sequence[int]]) -> dict[int, list[int]]:
    """Layer index → how often each expert was chosen for these texts, given as token numbers.

    LearningError for a model whose experts are not found.
    """
    with counted(model) as counts, torch.inference_mode():
        for ids_BT in batches(texts):
            model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)
    return {layer: found.tolist() for layer, found in counts.items()}


def batches(texts: Iterable[Sequence[int]]) -> Iterator[torch.Tensor]:
    """int64 [B, T] of texts that are equally long and follow each other; empty ones are left out."""
    for length, alike in groupby(texts, len):
        waiting = map(list, alike) if length else iter(())
        while batch := list(islice(waiting, _BATCH)):
            yield torch.tensor(batch)


def expert_modules(model: nn.Module) -> dict[int, Any]:
    """Layer index → the module of its experts. LearningError for a model that has none."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        match = _LAYER.search(name)
        if match is not None and isinstance(getattr(module, "num_experts", None), int):
            found[int(match[1])] = module
    if not found:
        raise LearningError(
            f"{type(model).__name__} has no layers of experts that are known",
            "a mixture of experts in transformers' layout is expected",
        )
    return found


def router_modules(model: nn.Module) -> dict[int, Any]:
    """Layer index → the module whose `weight` [E, H] chooses among its experts.

    LearningError if a layer has none that is known.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    found: dict[int, Any] = {}
    for layer, experts in expert_modules(model).items():
        block = modules[names[id(experts)].rpartition(".")[0]]
        for child in block.modules():
            weight = getattr(child, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and len(weight) == experts.num_experts:
                found[layer] = child
                break
        else:
            raise LearningError(
                f"the router of layer {layer} is of a kind that is not known", "train its experts alone"
            )
    return found


@contextmanager
def counted(
    model: nn.Module, counts: dict[int, torch.Tensor] | None = None
) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, layer index → int64 [E] of choices so far, whatever runs the model.

    `counts`: of an earlier block, to be added to.
    """
    modules = expert_modules(model)
    if counts is None:
        counts = {
            layer: torch.zeros(int(module.num_experts), dtype=torch.int64)
            for layer, module in modules.items()
        }
    hooks = [
        module.register_forward_pre_hook(_counter(counts[layer]), with_kwargs=True)
        for layer, module in modules.items()
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _counter(counts_E: torch.Tensor) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The second argument of the shared layout: (hidden states, choices [T, K], weights [T, K]).
        chosen_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
        counts_E.add_(torch.bincount(chosen_TK.reshape(-1).cpu(), minlength=len(counts_E)))

    return count
