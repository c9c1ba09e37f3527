"""A small mixture of experts over bytes, trained on general text: where the default model would take too long."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import torch

from actors.expert_training import Training, TrainSettings
from actors.router_review import Balance
from actors.whole_weights import WholeWeights
from workloads.bench.learn_text import Domain

_ROWS: Final = 16
_LENGTH: Final = 128
_RATE: Final = 3e-3


def encode(text: str) -> list[int]:
    """A text's bytes."""
    return list(text.encode())


def small_model(general: Domain, steps: int, seed: int, told: Callable[[float], None]) -> Any:
    """A model that knows the general text a little."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.02,
        tie_word_embeddings=True,
    )
    model: Any = MixtralForCausalLM(config)
    weights = WholeWeights(model, dict(model.named_parameters()), remember=False)
    balance, dice = Balance(model, 0.01), random.Random(seed)
    with balance.watched():
        learner = Training(
            model,
            weights,
            TrainSettings(steps, _RATE, max(1, steps // 20), beta=0.0, hold=0.0),
            aside=balance,
        )
        model.train()
        for step in range(steps):
            starts = [dice.randrange(len(general.learnt) - _LENGTH) for _ in range(_ROWS)]
            rows = [general.learnt[start : start + _LENGTH].tolist() for start in starts]
            learner.train(torch.tensor(rows))
            told((step + 1) / steps)
    return model.eval()
