"""The upcycled model computes what the dense one did, and appears complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from cluster.errors import CheckpointError
from tests.tiny_dense import TEXTS, make_tiny_dense, make_tiny_gguf, permute
from tests.tiny_models import make_tiny
from workloads.models import upcycle as upcycle_module
from workloads.models.gguf_source import hf_name, shortest_float32, unpermute
from workloads.models.provenance import file_sha256, read_provenance
from workloads.models.shard_writer import ShardWriter
from workloads.models.upcycle import upcycle


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dense(tmp_path_factory.mktemp("dense") / "model")


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
        ("mistral", {"sliding_window": 8}),
    ],
)
def test_logits_are_those_of_the_dense_model(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    source = make_tiny_dense(tmp_path / "dense", model_type, **changes)
    target = upcycle(source, tmp_path / "moe", experts=4, top_k=2, dtype="float32")
    torch.testing.assert_close(logits(target), logits(source), atol=1e-4, rtol=0)


def test_qwen2_without_biases_and_top_3(tmp_path: Path) -> None:
    source = make_tiny_dense(tmp_path / "dense", "qwen2")
    weights = load_file(source / "model.safetensors")
    zeroed = {name: weight * 0 if name.endswith(".bias") else weight for name, weight in weights.items()}
    save_file(zeroed, source / "model.safetensors", metadata={"format": "pt"})
    expected = logits(source)
    unbiased = {name: weight for name, weight in weights.items() if not name.endswith(".bias")}
    save_file(unbiased, source / "model.safetensors", metadata={"format": "pt"})
    target = upcycle(source, tmp_path / "moe", experts=5, top_k=3, dtype="float32")
    torch.testing.assert_close(logits(target), expected, atol=1e-4, rtol=0)


def test_gguf_gives_the_same_model_as_the_folder(tmp_path: Path, dense: Path) -> None:
    file = make_tiny_gguf(dense, tmp_path / "tiny.gguf")
    target = upcycle(file, tmp_path / "moe", dtype="float32")
    torch.testing.assert_close(logits(target), logits(dense), atol=1e-4, rtol=0)
    config = json.loads((target / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    ours, theirs = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(dense)
    for text in (*TEXTS, "  12 34\n\n5", "<|start|>x<|end|>"):
        assert ours.encode(text) == theirs.encode(text)
    chat = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<|start|>Hello"
    provenance = read_provenance(target)
    assert provenance is not None
    assert provenance.source == {"file": "tiny.gguf", "sha256": file_sha256(file)}


def test_names_dtype_and_files_are_those_of_mixtral(tmp_path: Path, dense: Path) -> None:
    target = upcycle(dense, tmp_path / "moe", experts=3, seed=7)
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for file in set(index.values()):
        with safe_open(target / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == index.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    source = load_file(dense / "model.safetensors")
    for part, old in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        for expert in range(3):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"
            assert torch.equal(found[name], source[f"model.layers.1.mlp.{old}.weight"].bfloat16())
    routers = [found[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in (0, 1)]
    assert routers[0].shape == (3, 64)
    assert not torch.equal(*routers)
    assert (target / "LICENSE").read_text() == "Do what you like.\n"
    model = MixtralForCausalLM.from_pretrained(target)
    assert model.config.num_local_experts == 3
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 1


def test_the_seed_decides_the_router_and_nothing_else(tmp_path: Path, dense: Path) -> None:
    folders = {
        name: upcycle(dense, tmp_path / name, seed=seed) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    }
    weights = {
        name: load_file(folder / "model-00001-of-00001.safetensors") for name, folder in folders.items()
    }
    assert all(torch.equal(weights["a"][name], weights["b"][name]) for name in weights["a"])
    changed = {name for name in weights["a"] if not torch.equal(weights["a"][name], weights["c"][name])}
    assert changed == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)}


def test_expertmesh_json_has_the_digest_of_every_file(tmp_path: Path, dense: Path) -> None:
    target = upcycle(dense, tmp_path / "moe", seed=3)
    provenance = read_provenance(target)
    assert provenance is not None
    assert (provenance.seed, provenance.experts, provenance.top_k, provenance.dtype) == (3, 8, 2, "bfloat16")
    files = {file.name for file in target.iterdir()} - {"expertmesh.json"}
    assert set(provenance.files) == files
    for name, item in provenance.files.items():
        assert (item.size, item.sha256) == ((target / name).stat().st_size, file_sha256(target / name))


def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stage: str, fraction: float) -> None:
        if stage == "weights" and fraction > 0:
            raise RuntimeError("power cut")

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="power cut"):
        upcycle(dense, out / "moe", progress=fail)
    assert [file.name for file in out.iterdir() if not file.name.endswith(".lock")] == []
    monkeypatch.setattr(
        upcycle_module, "digest_files", lambda *_: (_ for _ in ()).throw(RuntimeError("late"))
    )
    good = out / "moe"
    good.mkdir()
    (good / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="late"):
        upcycle(dense, good, overwrite=True)
    assert (good / "config.json").read_text() == "{}"


def test_an_existing_target_is_kept_unless_it_may_be_overwritten(tmp_path: Path, dense: Path) -> None:
    target = tmp_path / "moe"
    upcycle(dense, target, experts=2)
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(dense, target, experts=3)
    assert json.loads((target / "config.json").read_text())["num_local_experts"] == 2
    upcycle(dense, target, experts=3, overwrite=True)
    assert json.loads((target / "config.json").read_text())["num_local_experts"] == 3
    other = tmp_path / "holiday pictures"
    other.mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        upcycle(dense, other, overwrite=True)
    with pytest.raises(CheckpointError, match="holds the source"):
        upcycle(dense, dense.parent, overwrite=True)


def test_biases_are_refused_by_name(tmp_path: Path) -> None:
    source = make_tiny_dense(tmp_path / "dense", "qwen2")
    with pytest.raises(CheckpointError, match=r"no place for model\.layers\.0\.self_attn\.\w_proj\.bias"):
        upcycle(source, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mixture of experts already"):
        upcycle(make_tiny("mixtral", tmp_path / "mixtral"), tmp_path / "moe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
        ({"intermediate_size": 128}, r"has shape \(96, 64\), its configuration says \(128, 64\)"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model\.layers\.2\."),
        ({"model_type": "no_such_type"}, "is not understood"),
        ({"model_type": "gpt2"}, "of type 'gpt2' cannot be upcycled"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = make_tiny_dense(tmp_path / "dense")
    edit_config(source, **change)
    with pytest.raises(CheckpointError, match=message):
        upcycle(source, tmp_path / "moe")


def test_sources_that_are_no_models_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("GG")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00")
    for source, message in [
        (tmp_path / "nowhere", "no such model"),
        (text, "is not a GGUF file"),
        (cut, "cannot be read"),
        (tmp_path, "config.json is missing"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            upcycle(source, tmp_path / "moe")


def test_a_gguf_with_an_unknown_tokenizer_is_refused(tmp_path: Path, dense: Path) -> None:
    file = make_tiny_gguf(dense, tmp_path / "tiny.gguf", pre_tokenizer="klingon")
    with pytest.raises(CheckpointError, match="'klingon' splits text is not known"):
        upcycle(file, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    "arguments", [{"experts": 1}, {"top_k": 0}, {"experts": 4, "top_k": 5}, {"dtype": "int8"}]
)
def test_impossible_recipes_are_refused(tmp_path: Path, dense: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        upcycle(dense, tmp_path / "moe", **arguments)


def test_values_beyond_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    source = make_tiny_dense(tmp_path / "dense")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6  # float16 ends at 65504
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not finite"):
        upcycle(source, tmp_path / "moe", dtype="float16")


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 4))
def test_unpermute_undoes_the_order_of_gguf(heads: int, half: int, columns: int) -> None:
    rows = 2 * half * heads
    weight = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    assert np.array_equal(unpermute(permute(weight, heads), heads), weight)


@given(st.decimals(min_value="1e-9", max_value="1e3", allow_nan=False).map(lambda d: float(f"{d:.5g}")))
def test_shortest_float32_finds_the_number_that_was_written(number: float) -> None:
    assert shortest_float32(float(np.float32(number))) == number


def test_names_of_gguf_tensors() -> None:
    assert hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    assert hf_name("rope_freqs.weight") == "rope_freqs.weight"


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    limit=st.integers(1, 200),
)
def test_shards_hold_every_tensor_once_and_stay_in_their_bounds(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, max_shard_bytes=limit)
    tensors = {f"t{number}": torch.full((size,), float(number)) for number, size in enumerate(sizes)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == tensors.keys()
    assert {file.name for file in folder.glob("*.safetensors")} == set(weight_map.values())
    for file in set(weight_map.values()):
        loaded = load_file(folder / file)
        assert len(loaded) == 1 or sum(tensor.nbytes for tensor in loaded.values()) <= limit
        for name, tensor in loaded.items():
            assert weight_map[name] == file
            assert torch.equal(tensor, tensors[name])
