"""Experts read from checkpoints of real architectures equal transformers' own eager experts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from actors.expert_maths import layer_maths
from actors.expert_reader import open_layer
from actors.expert_weights import build_layer
from actors.vllm_cpu_kernel import vllm_cpu_isa, vllm_cpu_ops
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, HostError
from tests.tiny_models import ARCHITECTURES, make_tiny

LAYER, NUM_EXPERTS = 1, 8
needs_vllm = pytest.mark.skipif(vllm_cpu_ops() is None, reason="no CPU build of vLLM")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def checkpoint_of(arch: str, tiny: Path) -> Checkpoint:
    folder = tiny / arch
    return Checkpoint.open(folder if folder.exists() else make_tiny(arch, folder))


@cache
def reference_experts(path: Path) -> torch.nn.Module:
    """The experts of LAYER as transformers loads them, with its slow and plain forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    marker = f"layers.{LAYER}."
    return next(m for name, m in model.named_modules() if marker in name and hasattr(m, "is_concatenated"))


def routing(rows: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 128, generator=generator)
    ids = torch.rand(rows, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    return x, ids, torch.rand(rows, top_k, generator=generator)


@pytest.mark.parametrize("kernel", ["grouped-mm", "module", "vllm-cpu"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_all_and_some_experts_equal_the_eager_module(arch: str, kernel: str, tiny: Path) -> None:
    checkpoint = checkpoint_of(arch, tiny)
    if kernel == "vllm-cpu" and vllm_cpu_ops() is None:
        pytest.skip("no CPU build of vLLM")
    reference = reference_experts(checkpoint.path)
    # Out of order, so that a slot cannot pass for an expert's index.
    for local in ([3, 0, 1, 2, 7, 6, 5, 4], [6, 1, 4]):
        layer = build_layer(checkpoint, LAYER, local, torch.float32, kernel=kernel)
        assert layer.kernel == ("vllm-cpu-vec" if kernel == "vllm-cpu" else "grouped-mm")
        assert layer.weight_bytes == len(local) * checkpoint.expert_bytes(LAYER, "float32")
        slot_of = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32)
        slot_of[torch.tensor(local)] = torch.arange(len(local), dtype=torch.int32)
        for rows in (1, 5, 70, 1):
            x, ids, weights = routing(rows, checkpoint.top_k, seed=rows)
            slots, out = slot_of[ids], torch.full_like(x, torch.nan)
            layer.compute(x, slots, weights, out)
            expected = reference(x, ids, weights.masked_fill(slots < 0, 0.0))
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            assert out[(slots < 0).all(dim=1)].count_nonzero() == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gate_is_recognised(arch: str, tiny: Path) -> None:
    maths = layer_maths(checkpoint_of(arch, tiny), LAYER)
    assert maths.activation == ("swigluoai" if arch == "gpt_oss" else "silu")
    assert (maths.hidden, maths.intermediate) == (128, 96)


@needs_vllm
@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_kernels_agree(arch: str, tiny: Path) -> None:
    checkpoint = checkpoint_of(arch, tiny)
    x, ids, weights = routing(9, checkpoint.top_k)
    slots = torch.where(ids < 5, ids, -1).int()
    results = {}
    for kernel in ("auto", "grouped-mm", "module"):
        layer = build_layer(checkpoint, LAYER, range(5), torch.bfloat16, kernel=kernel)
        results[kernel] = torch.empty_like(x, dtype=torch.bfloat16)
        layer.compute(x.bfloat16(), slots, weights, results[kernel])
    exact = torch.empty_like(x)
    build_layer(checkpoint, LAYER, range(5), torch.float32).compute(x, slots, weights, exact)
    for result in results.values():
        error = (result.float() - exact).abs().max() / exact.abs().max()
        assert error < 0.02


@needs_vllm
def test_auto_takes_vllms_kernel_where_it_fits_and_a_choice_is_kept(tiny: Path) -> None:
    checkpoint = checkpoint_of("mixtral", tiny)
    amx = torch.cpu._is_amx_tile_supported()
    assert build_layer(checkpoint, 0, [0], torch.float32).kernel == "vllm-cpu-vec"
    chosen = build_layer(checkpoint, 0, [0], torch.bfloat16).kernel
    assert chosen == ("vllm-cpu-amx" if amx else "vllm-cpu-vec")
    assert build_layer(checkpoint, 0, [0], torch.float32, kernel="grouped-mm").kernel == "grouped-mm"
    with pytest.raises(HostError, match="use kernel auto"):
        build_layer(checkpoint, 0, [0], torch.float32, kernel="vllm-cpu-amx")


@needs_vllm
@pytest.mark.parametrize(("inner", "dtype"), [(80, torch.float32), (80, torch.bfloat16)])
def test_odd_intermediate_sizes_are_padded_as_vllm_does(
    tmp_path: Path, inner: int, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path, intermediate_size=inner))
    x, ids, weights = routing(6, 2)
    outs = []
    for kernel in ("vllm-cpu", "grouped-mm"):
        layer = build_layer(checkpoint, LAYER, range(NUM_EXPERTS), dtype, kernel=kernel)
        outs.append(torch.empty(6, 128, dtype=dtype))
        layer.compute(x.to(dtype), ids.int(), weights, outs[-1])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outs[0], outs[1], rtol=tolerance, atol=tolerance)


@needs_vllm
def test_what_vllm_cannot_run_goes_to_the_general_kernel(tmp_path: Path) -> None:
    # 7.5 instead of 7: the same class, but not the gate that vLLM's kernel has built in.
    other_gate = Checkpoint.open(make_tiny("gpt_oss", tmp_path / "gate", swiglu_limit=7.5))
    assert layer_maths(other_gate, LAYER).activation is None
    assert build_layer(other_gate, LAYER, [0], torch.float32).kernel == "grouped-mm"
    odd_hidden = make_tiny("mixtral", tmp_path / "hidden", hidden_size=80, num_attention_heads=5, head_dim=16)
    maths = layer_maths(Checkpoint.open(odd_hidden), LAYER)
    assert vllm_cpu_isa(maths, torch.float32) is None


def test_without_vllm_the_general_kernel_serves(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.vllm_cpu_kernel.vllm_cpu_ops", lambda: None)
    checkpoint = checkpoint_of("mixtral", tiny)
    assert build_layer(checkpoint, LAYER, [0], torch.float32).kernel == "grouped-mm"
    with pytest.raises(HostError, match="vLLM's choice here is none"):
        build_layer(checkpoint, LAYER, [0], torch.float32, kernel="vllm-cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_gpu_gives_what_the_cpu_gives(arch: str, tiny: Path) -> None:
    checkpoint = checkpoint_of(arch, tiny)
    x, ids, weights = routing(20, checkpoint.top_k)
    slots = torch.where(ids < 5, ids, -1).int()
    outs = [torch.empty_like(x), torch.empty_like(x)]
    for device, out in zip(("cpu", "cuda"), outs, strict=True):
        build_layer(checkpoint, LAYER, range(5), torch.float32, device).compute(x, slots, weights, out)
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-3)


def test_wrong_requests_are_one_clear_error(tiny: Path) -> None:
    checkpoint = checkpoint_of("deepseek_v3", tiny)
    with pytest.raises(CheckpointError, match="layer 0 has no routed experts"):
        build_layer(checkpoint, 0, [0], torch.float32)
    with pytest.raises(CheckpointError, match="no expert 8"):
        build_layer(checkpoint, LAYER, [8], torch.float32)
    with pytest.raises(HostError, match="no kernel of the name"):
        build_layer(checkpoint, LAYER, [0], torch.float32, kernel="fast")


def test_weights_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path / "a")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 64'))
    with pytest.raises(CheckpointError, match=r"config[.]json says"):
        build_layer(Checkpoint.open(folder), LAYER, [0], torch.float32)


def test_a_config_that_transformers_refuses_is_one_error(tmp_path: Path) -> None:
    folder = make_tiny("gpt_oss", tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match="transformers cannot build this model"):
        build_layer(Checkpoint.open(folder), LAYER, [0], torch.float32)


def test_a_file_that_vanishes_after_opening_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path))
    layer_maths(checkpoint, LAYER)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model[.]safetensors"):
        build_layer(checkpoint, LAYER, [0], torch.float32)


def test_sharded_checkpoints_give_the_same_experts(tmp_path: Path) -> None:
    outs = []
    x, ids, weights = routing(4, 2)
    for name, size in (("single", "50GB"), ("sharded", "300KB")):
        checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path / name, max_shard_size=size))
        outs.append(torch.empty_like(x))
        build_layer(checkpoint, LAYER, range(8), torch.float32).compute(x, ids.int(), weights, outs[-1])
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("transposed_on_disk", [False, True])
def test_fused_tensors_are_found_in_either_orientation(transposed_on_disk: bool, tmp_path: Path) -> None:
    """Qwen3-VL's checkpoints hold [in, out] where the module wants [out, in]."""
    source = Checkpoint.open(make_tiny("mixtral", tmp_path / "source"))
    maths = layer_maths(source, LAYER)
    with open_layer(source, LAYER, maths) as read:
        experts = [read(e) for e in range(NUM_EXPERTS)]
        up = torch.stack([torch.cat([e.gate_IH, e.up_IH]) for e in experts if e.gate_IH is not None])
        down = torch.stack([e.down_HI for e in experts])
    if transposed_on_disk:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / "config.json").write_text((source.path / "config.json").read_text())
    prefix = f"model.layers.{LAYER}.block_sparse_moe.experts"
    fused = {f"{prefix}.gate_up_proj": up.contiguous(), f"{prefix}.down_proj": down.contiguous()}
    save_file(fused, folder / "model.safetensors")
    x, ids, weights = routing(5, 2)
    outs = [torch.empty_like(x), torch.empty_like(x)]
    for checkpoint, out in zip((source, Checkpoint.open(folder)), outs, strict=True):
        build_layer(checkpoint, LAYER, range(8), torch.float32).compute(x, ids.int(), weights, out)
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_only_the_local_experts_stay_in_memory(arch: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 64}
    changes["num_hidden_layers"] = 1
    if arch == "gpt_oss":
        changes["layer_types"] = ["full_attention"]
    checkpoint = Checkpoint.open(make_tiny(arch, tmp_path, **changes))
    one = checkpoint.expert_bytes(0, "float32")
    process = psutil.Process()
    build_layer(checkpoint, 0, [0], torch.float32)  # imports, caches and thread pools settle
    before = process.memory_info().rss
    layer = build_layer(checkpoint, 0, [5, 2], torch.float32)
    grown = process.memory_info().rss - before
    assert layer.weight_bytes == 2 * one
    # Two of eight experts, of 12 MB each: a mapped or copied layer would be four times as much.
    assert grown < 3.2 * one
    assert str(checkpoint.path) not in Path("/proc/self/maps").read_text()
