"""The real default model: made from its package where that can be had, and answering as the dense one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import CheckpointError
from workloads.models.default_model import default_model
from workloads.models.inspect import inspect_model
from workloads.models.verify import verify_model


@pytest.mark.slow
def test_the_real_model_answers() -> None:
    try:
        path = default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be made: {error}")
    report = inspect_model(path)
    assert (report.moe_layers, report.experts_per_layer, report.top_k) == (30, (8,), 2)
    assert report.servable
    assert verify_model(path, deep=False).problems == ()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    # Without any setting it samples as its generation_config.json says, which must answer as well.
    for settings in ({"do_sample": False}, {}, {}, {}):
        output = model.generate(**prompt, max_new_tokens=12, **settings)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.startswith("The capital of France is Paris"), answer
