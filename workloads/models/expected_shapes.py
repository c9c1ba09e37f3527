"""The tensors that a checkpoint should have by its configuration, as transformers would build the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExpectedShapes:
    """``layouts`` are the ways to store the model: as published, and as transformers holds it in memory."""

    layouts: tuple[Shapes, ...]
    optional: frozenset[str]
    """Names that may be absent, because they are tied to another tensor."""


def expected_shapes(path: Path) -> ExpectedShapes | None:
    """Shapes by the config.json in ``path``; ``None`` where transformers cannot build the model.

    The model is built on the meta device: no memory, no weights, and no code from the folder is run.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        held = model.state_dict()
        published = revert_weight_conversion(model, dict(held))
    except Exception:  # code of its own, a later version's type, a broken value: all mean "cannot"
        return None
    tied = getattr(model, "_tied_weights_keys", None) or ()
    text = config.get_text_config()
    return ExpectedShapes(
        layouts=(_shapes(published), _shapes(held)),
        optional=frozenset(tied) if text.tie_word_embeddings else frozenset(),
    )


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
