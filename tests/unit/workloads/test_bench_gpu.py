"""`expertmesh bench gpu`, as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import Checkpoint
from cluster.errors import ConfigError, HostError
from cluster.messages import HostAddress, HostCost
from cluster.table import PlacementTable
from workloads.bench import gpu
from workloads.bench.gpu_mesh import GpuMesh, HostPlan, all_experts
from workloads.bench.gpu_model import ModelShape, make, preference
from workloads.bench.gpu_placement import even, planned

TINY = ModelShape(layers=2, hidden=32, intermediate=16, experts=8, top_k=2, heads=2, kv_heads=1, head_dim=16,
                  vocabulary=64)  # fmt: skip


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--part kernel is no part of this measurement") as refused:
        gpu.measure(["kernel"], tmp_path, None, print)
    assert "kernels" in str(refused.value.hint)


def test_the_mixed_part_needs_a_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a routing trace"):
        gpu.measure(None, tmp_path, None, print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no NVIDIA GPU"):
        gpu.measure(["kernels"], tmp_path, None, print)


def test_models_go_and_what_lay_beside_them_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with gpu.models_in(tmp_path) as models:
        (models / "model").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="no folder can be made there"), gpu.models_in(tmp_path / "absent"):
        pass


def test_bars_are_of_what_was_measured() -> None:
    nothing = {part: [] for part in gpu.PARTS} | {"tokens": {}}
    assert gpu._bars(nothing) == []
    killed = {"replica": "CPU", "failed": 1, "longest_gap_ms": 499.0, "freed_bytes": 90, "host_bytes": 100}
    serving = [{"batch": 64, "ratio": 0.89}, {"batch": 1, "ratio": 0.7}]
    bars = gpu._bars(
        nothing | {"kill": [killed], "serving": serving, "tokens": {"equal": {"a": True, "b": False}}}
    )
    assert {bar.key: bar.met for bar in bars} == {
        "serving_64": False,
        "serving_1": True,
        "kill_replica_on_cpu_failed": False,
        "kill_replica_on_cpu_gap_ms": True,
        "kill_replica_on_cpu_freed": False,
        "unequal_tokens": False,
    }


def test_a_random_model_is_a_checkpoint_and_the_same_for_a_seed(tmp_path: Path) -> None:
    first, again = (make(tmp_path / name, TINY, "float32", "cpu") for name in ("a", "b"))
    opened = Checkpoint.open(first)
    assert [(layer.index, layer.num_experts) for layer in opened.moe_layers] == [(0, 8), (1, 8)]
    assert (opened.hidden_size, opened.top_k) == (32, 2)
    assert opened.digest == Checkpoint.open(again).digest
    assert json.loads((first / "config.json").read_text())["vocab_size"] == 64


def test_a_router_s_preference_gives_the_shares_asked_for() -> None:
    share_E = torch.arange(1, 33).float()
    generator = torch.Generator().manual_seed(0)
    bias_E = preference(share_E, 4, generator)
    chosen = (torch.randn(20_000, 32, generator=generator) + bias_E).topk(4, 1).indices
    found_E = torch.bincount(chosen.flatten(), minlength=32) / chosen.numel()
    assert torch.allclose(found_E, share_E / share_E.sum(), atol=0.004)


def test_an_even_split_gives_every_host_as_many() -> None:
    split = even({0: 6, 3: 4}, ["a", "b"])
    assert split == {0: ["a", "b"] * 3, 3: ["a", "b"] * 2}


def test_a_plan_follows_the_measured_speeds() -> None:
    counts = {layer: [100] * 32 for layer in (0, 3)}
    fast, slow = HostCost(0.0, 1e-5, 1e-6), HostCost(0.0, 3e-5, 3e-6)
    first, seconds = planned({"a": fast, "b": slow}, counts, 64, 4)
    for of_layer in first.values():
        assert len(of_layer) == 32 and 6 <= of_layer.count("b") <= 10
    alike, longer = planned({"a": slow, "b": slow}, counts, 64, 4)
    assert {of_layer.count("b") for of_layer in alike.values()} == {16}
    assert seconds < longer


def test_a_table_names_first_who_is_to_be_asked_first(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "model", TINY, device="cpu"))
    every = all_experts(checkpoint)
    plans = [HostPlan("a", "cuda:0", every), HostPlan("b", "cuda:1", every)]
    mesh = GpuMesh(checkpoint, "float32", plans)
    mesh.addresses = {name: HostAddress(name, "here", name, "", 1) for name in "ab"}
    split = even({layer: len(held) for layer, held in every.items()}, ["b", "a"])
    plain, ordered = (PlacementTable.from_json(text) for text in (mesh.table(), mesh.table(split)))
    assert ordered.epoch == plain.epoch + 1
    for layer in every:
        assert {hosts for hosts in plain.experts[layer]} == {("a", "b")}
        assert [hosts[0] for hosts in ordered.experts[layer]] == list(split[layer])
        assert {frozenset(hosts) for hosts in ordered.experts[layer]} == {frozenset("ab")}
