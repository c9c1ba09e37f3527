"""What a round of learning is about: samples, experts, and clones of experts."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import LearningError
from cluster.versions.growth import routers
from workloads.learn_experts import ExpertChoice, Samples, clones_for, experts_for, unsure

if TYPE_CHECKING:
    import torch

    from workloads.learn_workshop import Workshop

CloneRows = Mapping[tuple[int, int], "torch.Tensor"]
"""(Layer, expert) → the row of the router of its clone."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a round is about."""

    samples: Samples
    """Those that are learnt: all of the new ones, or what the model is least sure of."""
    choice: ExpertChoice
    rows: CloneRows


def choose(workshop: Workshop, samples: Samples, parent: str, seed: int) -> Lesson:
    """The samples that are learnt, the experts that they are about, and rows of those that are to be cloned.

    LearningError if there are none.
    """
    from actors.text_routing import expert_modules
    from actors.trainable_version import open_encoder, open_version

    workshop.progress("loading the model", 0.0)
    model = open_version(workshop.checkpoint, workshop.store, workshop.own(parent))
    wanted, encode = workshop.settings.training, open_encoder(workshop.checkpoint)
    if wanted.select < 1:
        new = unsure(model, encode, samples.new, wanted.select, workshop.progress)
        samples = Samples(samples.domain, new, samples.old)
    weights = sum(parameter.numel() for parameter in model.parameters())
    largest = max(layout.expert_parameters for layout in workshop.checkpoint.layouts.values())
    found = experts_for(
        model,
        encode,
        samples,
        reach=wanted.reach,
        tokens=wanted.counted,
        seed=seed,
        progress=workshop.progress,
        most=max(1, int(wanted.most * weights / largest)),
    )
    rows: CloneRows = {}
    if wanted.clones:
        sizes = {layer: int(module.num_experts) for layer, module in expert_modules(model).items()}

        def room(layer: int) -> int:
            return max(0, wanted.clones - sizes[layer] + workshop.checkpoint.layout(layer).num_experts)

        rows = clones_for(model, encode, samples, found, room, tokens=wanted.counted, seed=seed)
        rows = {which: _rounded(workshop, which[0], row) for which, row in rows.items()}
    del model
    gc.collect()
    if not found.chosen:
        raise LearningError(
            f"no expert is asked for {samples.domain} more than for what is known",
            "it may be known already; or give more text of it",
        )
    return Lesson(samples, found, rows)


def _rounded(workshop: Workshop, layer: int, row_H: torch.Tensor) -> torch.Tensor:
    """As the checkpoint's dtype can hold it: what will serve."""
    from actors.expert_slices import DTYPES

    name = next(name for name, of in routers(workshop.checkpoint).items() if of == layer)
    return row_H.to(DTYPES[workshop.checkpoint.tensors[name].dtype]).float()
