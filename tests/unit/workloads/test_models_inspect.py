"""Counts of the report against those of the model itself, for every architecture that is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cluster.errors import CheckpointError
from tests.integration.test_same_tokens import SUPPORTED
from tests.tiny_dense import make_tiny_dense, make_tokenizer
from tests.tiny_models import make_tiny
from workloads.models.inspect import COMPARED_TYPES, inspect_model


@pytest.mark.parametrize(
    ("arch", "layers", "experts", "top_k", "shared"),
    [
        ("mixtral", 2, 8, 2, 0),
        ("olmoe", 2, 8, 4, 0),
        ("qwen2_moe", 2, 8, 2, 1),
        ("qwen3_moe", 2, 8, 4, 0),
        ("deepseek_v2", 2, 8, 2, 1),
        ("deepseek_v3", 2, 8, 3, 1),
        ("glm4_moe", 2, 8, 2, 1),
        ("granitemoe", 2, 8, 3, 0),
    ],
)
def test_served_architectures(
    tmp_path: Path, arch: str, layers: int, experts: int, top_k: int, shared: int
) -> None:
    path = make_tiny(arch, tmp_path / arch)
    report = inspect_model(path)
    assert (report.moe_layers, report.experts_per_layer) == (layers, (experts,))
    assert (report.top_k, report.shared_experts) == (top_k, shared)
    model = AutoModelForCausalLM.from_pretrained(path)
    buffers = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert report.parameters == sum(p.numel() for p in model.parameters()) + buffers
    one_expert = 3 * 128 * 96  # gate, up and down between hidden size 128 and width 96
    assert report.expert_parameters == layers * experts * one_expert
    assert report.active_parameters == report.parameters - layers * (experts - top_k) * one_expert
    assert (report.expert_bytes, report.intermediate_size, report.hidden_size) == (4 * one_expert, 96, 128)
    assert report.dtypes == {"float32": report.weight_bytes}
    assert report.weight_bytes == 4 * report.parameters
    assert report.servable and "the same tokens" in report.reason
    assert report.architecture == type(model).__name__


def test_compared_are_those_that_the_tests_compare() -> None:
    assert set(SUPPORTED) == COMPARED_TYPES


def test_a_dense_model_is_described_but_not_servable(tmp_path: Path) -> None:
    path = make_tiny_dense(tmp_path / "dense")
    report = inspect_model(path)
    assert (report.layers, report.moe_layers, report.experts_per_layer, report.top_k) == (2, 0, (), 0)
    assert report.active_parameters == report.parameters > 0
    assert (report.vocab_size, report.max_context) == (len(make_tokenizer()), 256)
    assert not report.servable
    assert "no routed experts" in report.reason
    assert "tokenizer.json" in {file.name for file in report.files}


def test_a_refused_architecture_says_why(tmp_path: Path) -> None:
    report = inspect_model(make_tiny("gpt_oss", tmp_path / "model"))
    assert (report.moe_layers, report.experts_per_layer) == (2, (8,))
    assert not report.servable
    assert "gpt-oss" in report.reason


def test_an_architecture_that_was_not_compared_says_so(tmp_path: Path) -> None:
    path = make_tiny("granitemoe", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "granitemoehybrid"}))
    report = inspect_model(path)
    assert report.servable
    assert "not compared" in report.reason


def test_prediction_heads_are_stored_but_never_active(tmp_path: Path) -> None:
    path = make_tiny("deepseek_v3", tmp_path / "model")
    whole = inspect_model(path)
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (path / "config.json").write_text(json.dumps(config))
    report = inspect_model(path)
    assert report.parameters == whole.parameters
    assert report.moe_layers == whole.moe_layers - 1
    assert report.active_parameters < whole.active_parameters


def test_torn_and_missing_files_are_errors(tmp_path: Path) -> None:
    path = make_tiny("mixtral", tmp_path / "model")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect_model(path)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect_model(tmp_path)
