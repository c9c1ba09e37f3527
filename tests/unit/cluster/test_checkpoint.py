"""Opening checkpoints: which tensors are experts, and what is said of broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.messages import MoeLayer

HIDDEN, INNER, EXPERTS = 8, 6, 3
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "transformers_version": "5.0.0",
}


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float16)


def per_expert(
    prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Any]:
    gate, up, down = names
    return {
        f"{prefix}.experts.{e}.{part}.weight": zeros(*shape)
        for e in range(EXPERTS)
        for part, shape in ((gate, (INNER, HIDDEN)), (up, (INNER, HIDDEN)), (down, (HIDDEN, INNER)))
    }


def deepseek_like() -> dict[str, Any]:
    """A dense layer, an expert layer with a shared expert, and a prediction layer beyond the last."""
    return {
        "model.embed_tokens.weight": zeros(32, HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": zeros(16, HIDDEN),
        "model.layers.1.mlp.gate.weight": zeros(EXPERTS, HIDDEN),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": zeros(INNER, HIDDEN),
        **per_expert("model.layers.1.mlp"),
        **per_expert("model.layers.2.mlp"),
    }


def write(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, tensors: dict[str, Any]) -> Path:
    write(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_routed_experts_are_told_from_shared_dense_and_prediction_layers(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, deepseek_like()))
    assert checkpoint.moe_layers == (MoeLayer(1, EXPERTS, 3 * HIDDEN * INNER),)
    assert checkpoint.is_expert_tensor("model.layers.1.mlp.experts.2.up_proj.weight")
    for name in (
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.2.mlp.experts.0.up_proj.weight",
    ):
        assert not checkpoint.is_expert_tensor(name)
    assert checkpoint.expert_bytes(1, "bfloat16") == 2 * 3 * HIDDEN * INNER
    assert checkpoint.expert_bytes(1, "float32") == 4 * 3 * HIDDEN * INNER
    assert checkpoint.dense_bytes("float16") == 2 * HIDDEN * (32 + 16 + EXPERTS + INNER)
    assert checkpoint.dense_bytes("float32") == 2 * checkpoint.dense_bytes("float16")
    assert (checkpoint.hidden_size, checkpoint.top_k, checkpoint.dtype) == (HIDDEN, 2, "float16")


@pytest.mark.parametrize(
    ("tensors", "fused"),
    [
        (per_expert("model.layers.0.block_sparse_moe", ("w1", "w3", "w2")), False),
        (per_expert("language_model.model.layers.0.feed_forward"), False),
        (
            {
                "model.language_model.layers.0.mlp.experts.gate_up_proj": zeros(EXPERTS, HIDDEN, 2 * INNER),
                "model.language_model.layers.0.mlp.experts.down_proj": zeros(EXPERTS, INNER, HIDDEN),
            },
            True,
        ),
        (
            {
                "model.layers.0.block_sparse_moe.input_linear.weight": zeros(EXPERTS, 2 * INNER, HIDDEN),
                "model.layers.0.block_sparse_moe.output_linear.weight": zeros(EXPERTS, HIDDEN, INNER),
            },
            True,
        ),
    ],
)
def test_layouts(tmp_path: Path, tensors: dict[str, Any], fused: bool) -> None:
    extra = {"mtp.layers.0.mlp.experts.0.up_proj.weight": zeros(2, 2), "lm_head.weight": zeros(4, HIDDEN)}
    checkpoint = Checkpoint.open(write(tmp_path, {**tensors, **extra}))
    assert checkpoint.moe_layers == (MoeLayer(0, EXPERTS, 3 * HIDDEN * INNER),)
    assert checkpoint.layout(0).fused is fused
    assert checkpoint.expert_tensors == set(tensors)
    assert checkpoint.dense_bytes("float16") == 2 * 4 * HIDDEN


def test_biases_count_as_parameters(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.gate_up_proj": zeros(EXPERTS, HIDDEN, 2 * INNER),
        f"{prefix}.gate_up_proj_bias": zeros(EXPERTS, 2 * INNER),
        f"{prefix}.down_proj": zeros(EXPERTS, INNER, HIDDEN),
        f"{prefix}.down_proj_bias": zeros(EXPERTS, HIDDEN),
    }
    checkpoint = Checkpoint.open(write(tmp_path, tensors))
    assert checkpoint.moe_layers[0].expert_parameters == 3 * HIDDEN * INNER + 2 * INNER + HIDDEN


def test_text_config_of_a_multimodal_model_is_used(tmp_path: Path) -> None:
    nested = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_experts_per_tok": 3}
    config = {"model_type": "qwen3_5_moe", "text_config": nested, "hidden_size": 999}
    checkpoint = Checkpoint.open(write(tmp_path, per_expert("model.language_model.layers.0.mlp"), config))
    assert (checkpoint.hidden_size, checkpoint.top_k) == (HIDDEN, 3)


def test_offsets_point_at_the_data(tmp_path: Path) -> None:
    tensors = deepseek_like()
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    tensors[name] = np.arange(HIDDEN * INNER, dtype=np.float16).reshape(HIDDEN, INNER)
    entry = Checkpoint.open(write_sharded(tmp_path, tensors)).tensors[name]
    data = (tmp_path / entry.file).read_bytes()[entry.start : entry.end]
    assert np.array_equal(np.frombuffer(data, dtype=np.float16).reshape(entry.shape), tensors[name])


def test_sharded_and_single_describe_the_same_model(tmp_path: Path) -> None:
    single = Checkpoint.open(write(tmp_path / "single", deepseek_like()))
    sharded = Checkpoint.open(write_sharded(tmp_path / "sharded", deepseek_like()))
    assert sharded.moe_layers == single.moe_layers
    assert sharded.dense_bytes("float16") == single.dense_bytes("float16")
    assert {entry.file for entry in sharded.tensors.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_digest_follows_the_model_and_not_the_save(tmp_path: Path) -> None:
    digest = Checkpoint.open(write(tmp_path / "a", deepseek_like())).digest
    saved_again = {**CONFIG, "transformers_version": "5.19.0", "_name_or_path": "elsewhere"}
    assert Checkpoint.open(write(tmp_path / "b", deepseek_like(), saved_again)).digest == digest
    other_config = {**CONFIG, "routed_scaling_factor": 2.5}
    assert Checkpoint.open(write(tmp_path / "c", deepseek_like(), other_config)).digest != digest
    other_weights = deepseek_like()
    other_weights["model.embed_tokens.weight"] = other_weights["model.embed_tokens.weight"] + 1
    assert Checkpoint.open(write(tmp_path / "d", other_weights)).digest != digest
    fewer = {name: t for name, t in deepseek_like().items() if name != "model.embed_tokens.weight"}
    assert Checkpoint.open(write(tmp_path / "e", fewer)).digest != digest


def expect_error(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


def test_missing_things_are_named(tmp_path: Path) -> None:
    expect_error(tmp_path / "nowhere", "no such folder", "nowhere")
    expect_error(tmp_path, "config.json", "missing")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    expect_error(tmp_path, "no *.safetensors")
    folder = write_sharded(tmp_path / "sharded", deepseek_like())
    (folder / "model-00002-of-00002.safetensors").unlink()
    expect_error(folder, "model-00002-of-00002.safetensors", "missing")


def test_a_shard_without_a_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, deepseek_like())
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({"something.else": zeros(1)}, shard)
    expect_error(folder, shard.name, "lacks")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_torn_files_are_found(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path, deepseek_like()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    expect_error(tmp_path, "model.safetensors")


def test_files_with_more_or_other_bytes_are_found(tmp_path: Path) -> None:
    file = write(tmp_path, deepseek_like()) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")
    expect_error(tmp_path, "model.safetensors")
    file.write_bytes(whole[:8] + b"!" + whole[9:])
    expect_error(tmp_path, "model.safetensors", "header")
    (tmp_path / "config.json").write_text("{")
    expect_error(tmp_path, "config.json")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 1}
    write(tmp_path, {"model.layers.0.mlp.gate_proj.weight": zeros(INNER, HIDDEN)}, config)
    expect_error(tmp_path, "no routed experts", "llama")


def test_incomplete_experts_are_named(tmp_path: Path) -> None:
    tensors = deepseek_like()
    del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    expect_error(write(tmp_path / "one", tensors), "layer 1", "up", "expert 1")
    for expert in (0, 2):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    expect_error(write(tmp_path / "all", tensors), "layer 1", "incomplete")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", "quantised"),
        ("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv", "quantised"),
        ("model.layers.1.mlp.experts.0.linear_v.weight", "no known layout"),
    ],
)
def test_unreadable_layouts_are_refused(tmp_path: Path, name: str, word: str) -> None:
    expect_error(write(tmp_path, {**deepseek_like(), name: zeros(2, 2)}), name, word)


def test_experts_in_eight_bits_are_refused(tmp_path: Path) -> None:
    tensors = {name: array.astype(np.int8) for name, array in deepseek_like().items()}
    expect_error(write(tmp_path, tensors), "I8")


def test_an_unknown_layer_is_an_error_with_the_known_ones(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, deepseek_like()))
    with pytest.raises(CheckpointError, match="layers with experts: 1"):
        checkpoint.layout(0)


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    write(tmp_path, deepseek_like())
    code = (
        "import sys; from pathlib import Path; from cluster.checkpoint import Checkpoint; "
        "Checkpoint.open(Path(sys.argv[1])); assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[3])
