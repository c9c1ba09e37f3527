"""From configuration and checkpoint to what hosts and router are told, on a tiny Mixtral."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.deployment import from_document, to_document
from cluster.errors import CheckpointError, ConfigError, PlacementError
from cluster.messages import CapacitySettings, EngineSettings, NodeInfo
from cluster.repair_state import planned as planned_states
from cluster.table import PlacementTable
from tests.tiny_models import make_tiny
from workloads.deploy import (
    Blueprint,
    attention_arguments,
    blueprint,
    check_supported,
    choose_dtype,
    engine_environment,
    router_spec,
    router_spec_for,
    served_name,
)
from workloads.engine_resources import engine_memory
from workloads.serve import open_model

GIB = 2**30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tmp_path_factory.mktemp("tiny") / "mixtral"))


def nodes(count: int) -> tuple[NodeInfo, ...]:
    return tuple(
        NodeInfo(f"n{i}", f"10.0.0.{i + 1}", f"host{i}", cpus=4, gpus=0, memory_bytes=4 * GIB)
        for i in range(count)
    )


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def planned(settings: Config, checkpoint: Checkpoint, count: int = 1) -> Blueprint:
    return blueprint(settings, checkpoint, "float32", "tiny", nodes(count))


def test_the_table_and_the_hosts_agree_on_who_holds_what(checkpoint: Checkpoint) -> None:
    settings = config(
        hosts=[{"name": "a", "count": 2}, {"name": "b", "threads": 1}], placement={"replicas": 2}
    )
    made = planned(settings, checkpoint, 2)
    table = PlacementTable.from_json(made.deployment.table)
    assert (table.manifest, table.epoch, table.running) == (checkpoint.digest, 0, ())
    held = {
        (spec.host_id, layer, expert)
        for spec in made.deployment.hosts
        for layer, experts in spec.experts.items()
        for expert in experts
    }
    routed = {
        (host, layer, expert)
        for layer, rows in table.experts.items()
        for expert, hosts in enumerate(rows)
        for host in hosts
    }
    assert held == routed
    assert len(held) == 2 * sum(layer.num_experts for layer in checkpoint.moe_layers)


def test_a_host_is_told_its_node_model_and_kernel(checkpoint: Checkpoint) -> None:
    settings = config(hosts=[{"name": "a", "kernel": "module"}, {"name": "b", "threads": 3}])
    specs = {spec.host_id: spec for spec in planned(settings, checkpoint).deployment.hosts}
    assert set(specs) == {"a-0", "b-0"}
    for spec in specs.values():
        assert (spec.node_id, spec.device, spec.dtype) == ("n0", "cpu", "float32")
        assert spec.model == spec.manifest == checkpoint.digest
        assert spec.model_path == str(checkpoint.path)
    assert (specs["a-0"].kernel, specs["b-0"].kernel) == ("module", "auto")
    assert specs["b-0"].threads == 3
    assert specs["a-0"].unix != specs["b-0"].unix


def test_two_deployments_of_one_machine_listen_under_different_names(checkpoint: Checkpoint) -> None:
    one, two = (planned(config(), checkpoint).deployment.hosts[0].unix for _ in range(2))
    assert one != two


@pytest.mark.parametrize(
    ("tcp", "count", "listens"),
    [("auto", 1, False), ("auto", 2, True), ("always", 1, True), ("never", 2, False)],
)
def test_tcp_is_opened_only_where_it_is_wanted(
    checkpoint: Checkpoint, tcp: str, count: int, listens: bool
) -> None:
    settings = config(hosts=[{"count": 2}], data_plane={"tcp": tcp})
    for spec in planned(settings, checkpoint, count).deployment.hosts:
        assert spec.tcp_ip == (f"10.0.0.{int(spec.node_id[1:]) + 1}" if listens else "")


def test_a_host_that_the_plan_gives_nothing_is_not_started(checkpoint: Checkpoint) -> None:
    experts = sum(layer.num_experts for layer in checkpoint.moe_layers)
    made = planned(config(hosts=[{"count": experts + 1}]), checkpoint)
    assert len(made.slots) == experts + 1
    assert len(made.deployment.hosts) == experts
    assert all(any(spec.experts.values()) for spec in made.deployment.hosts)


def test_the_hottest_experts_are_held_more_often(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    hottest = {"share": 0.25, "replicas": 3, "counts": str(file)}
    settings = config(hosts=[{"count": 3}], placement={"replicas": {"default": 2, "hottest": hottest}})
    with pytest.raises(ConfigError, match=r"counts\.json cannot be read: No such file"):
        planned(settings, checkpoint)
    file.write_text(json.dumps({"0": [9, 1, 1, 1, 1, 1, 1, 9], "1": [1, 1, 1, 9, 9, 1, 1, 1]}))
    table = PlacementTable.from_json(planned(settings, checkpoint).deployment.table)
    thrice = {layer: [e for e in range(8) if len(table.replicas(layer, e)) == 3] for layer in (0, 1)}
    assert thrice == {0: [0, 7], 1: [3, 4]}


def test_experts_that_do_not_fit_are_refused_with_the_number(checkpoint: Checkpoint) -> None:
    with pytest.raises(PlacementError, match="MiB"):
        planned(config(hosts=[{"memory": "1MiB"}]), checkpoint)


def test_memory_is_kept_for_the_engines_on_their_node(checkpoint: Checkpoint) -> None:
    settings = config(hosts=[{"count": 2}], engine={"kv_cache": "512MiB", "replicas": 3})
    dense = checkpoint.dense_bytes("float32")
    each = GIB // 2 + dense
    assert engine_memory(settings, checkpoint, "float32") == each
    assert engine_memory(settings, checkpoint, "bfloat16") == GIB // 2 + dense // 2
    taken = 3 * each
    left = planned(settings, checkpoint, 2).slots
    memory = {slot.node_id: slot.memory_bytes for slot in left}
    assert memory == {"n0": int((4 * GIB - taken) * 0.8), "n1": int(4 * GIB * 0.8)}


def test_memory_is_kept_on_every_node_that_engines_may_come_to(checkpoint: Checkpoint) -> None:
    settings = config(engine={"kv_cache": "512MiB", "replicas": 3, "selector": {"role": "!x"}})
    made = planned(settings, checkpoint, 2)
    each = engine_memory(settings, checkpoint, "float32")
    # At most two of three on one of them.
    assert made.deployment.limits.reserved_bytes == {"n0": 2 * each, "n1": 2 * each}


def test_an_engine_on_a_gpu_takes_its_share_of_it_and_no_memory_of_its_node(checkpoint: Checkpoint) -> None:
    settings = config(
        engine={"device": "cuda", "gpus": 0.4, "kv_cache": "64GiB"},
        hosts=[{"name": "gpu", "count": 2, "device": "cuda", "gpus": "0.3", "memory": "1GiB"}],
    )
    assert engine_memory(settings, checkpoint, "float32") == 0
    two = tuple(replace(node, gpus=1) for node in nodes(2))
    made = blueprint(settings, checkpoint, "float32", "tiny", two, "n1")
    # The engine's GPU has room for both, and so none is on the other one.
    assert [(spec.node_id, spec.gpus) for spec in made.deployment.hosts] == [("n1", Decimal("0.3"))] * 2
    assert made.deployment.limits.reserved_gpus == {"n1": (Decimal("0.4"),)}
    assert router_spec(settings, made).engine["gpu_memory_utilization"] == 0.36
    again, _ = from_document(to_document(made.deployment, planned_states({}, 0), 0.0), 0.0)
    assert (again.limits, again.hosts) == (made.deployment.limits, made.deployment.hosts)


def test_vllm_takes_what_it_is_told_of_a_gpu_else_what_it_takes_by_default(checkpoint: Checkpoint) -> None:
    told = {"device": "cuda", "gpus": 0.4, "options": {"gpu_memory_utilization": 0.5}}
    for engine, expected in ((told, 0.5), ({"device": "cuda"}, None), ({}, None)):
        spec = router_spec_for(config(engine=engine), checkpoint, "float32", "tiny")
        assert spec.engine.get("gpu_memory_utilization") == expected


@pytest.mark.parametrize(
    ("kv_cache", "memory", "words"),
    [
        ("5GiB", "auto", r"0 of 1 hosts fit; memory left: host0 0\.0 GiB"),
        ("3GiB", "2GiB", "0 of 1 hosts fit; memory left: host0 "),
        ("4095MiB", "auto", "the experts take"),
    ],
)
def test_too_little_memory_beside_the_engine_is_refused_with_numbers(
    checkpoint: Checkpoint, kv_cache: str, memory: str, words: str
) -> None:
    settings = config(engine={"kv_cache": kv_cache}, hosts=[{"memory": memory}])
    with pytest.raises(PlacementError, match=words) as error:
        planned(settings, checkpoint)
    assert "KV cache" in error.value.message and "weights" in error.value.message
    assert "engine.kv_cache" in error.value.hint


@pytest.mark.parametrize(
    ("model_type", "word"),
    [("gpt_oss", "gpt-oss"), ("dbrx", "DBRX"), ("llama4", "Llama 4"), ("llama4_text", "Llama 4")],
)
def test_architectures_that_cannot_work_are_refused_at_once(
    checkpoint: Checkpoint, model_type: str, word: str
) -> None:
    other = replace(checkpoint, config={**checkpoint.config, "model_type": model_type})
    with pytest.raises(CheckpointError, match=word) as error:
        check_supported(other)
    assert "Mixtral" in error.value.hint
    with pytest.raises(CheckpointError, match=word):
        planned(config(), other)
    check_supported(checkpoint)


def test_the_router_knows_the_model_and_the_limits(checkpoint: Checkpoint) -> None:
    settings = config(
        engine={"max_num_seqs": 7, "kv_cache": "64MiB", "max_model_len": 99, "options": {"seed": 3}},
        server={"api_keys": ["secret"], "max_queue": 9, "request_timeout": "2m"},
        data_plane={"deadline": "3s", "connect_timeout": "4s"},
    )
    spec = router_spec(settings, planned(settings, checkpoint))
    assert (spec.model_path, spec.served_name) == (str(checkpoint.path), "tiny")
    known = spec.settings
    assert (known.hidden, known.top_k, known.dtype, known.moe_layers) == (128, 2, "float32", (0, 1))
    assert (known.model, known.deadline_s, known.connect_timeout_s) == (checkpoint.digest, 3.0, 4.0)
    assert (spec.max_requests, spec.request_timeout_s) == (9, 120.0)
    assert spec.engine["max_num_seqs"] == 7
    assert spec.engine["kv_cache_memory_bytes"] == 64 * 2**20
    assert spec.engine["max_model_len"] == 99
    assert spec.engine["seed"] == 3
    assert spec.engine["dtype"] == "float32"
    assert "max_num_batched_tokens" not in spec.engine
    assert "secret" not in repr(spec) and len(spec.api_key_digests) == 1


@pytest.mark.parametrize(("batched", "rows"), [(None, 2048), (100, 100), (100_000, 2048)])
def test_a_message_holds_a_step_but_never_more_than_the_bound(
    checkpoint: Checkpoint, batched: int | None, rows: int
) -> None:
    settings = config(engine={"max_num_batched_tokens": batched})
    spec = router_spec(settings, planned(settings, checkpoint))
    assert spec.settings.max_rows == rows
    assert spec.engine.get("max_num_batched_tokens") == batched


@pytest.mark.parametrize(
    ("configured", "recommended", "chosen"),
    [
        ("float16", "bfloat16", "float16"),
        ("auto", "bfloat16", "bfloat16"),
        ("auto", None, "float32"),
    ],
)
def test_dtype_is_the_configured_the_recommended_or_the_one_on_disk(
    checkpoint: Checkpoint, configured: str, recommended: str | None, chosen: str
) -> None:
    assert choose_dtype(config(model={"dtype": configured}), checkpoint, recommended) == chosen


def test_a_dtype_that_no_host_computes_in_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="float64") as error:
        choose_dtype(config(), checkpoint, "float64")
    assert "model.dtype" in error.value.hint


def test_latent_attention_in_float32_is_kept_off_the_packed_kernel(checkpoint: Checkpoint) -> None:
    latent = replace(checkpoint, config={**checkpoint.config, "kv_lora_rank": 512})
    assert attention_arguments(latent, "float32") == {"attention_backend": "CPU_MLA"}
    assert attention_arguments(latent, "bfloat16") == {}
    assert attention_arguments(checkpoint, "float32") == {}


@pytest.mark.parametrize(("inside", "given"), [("..", "mixtral"), (".", "."), ("sub", "../../mixtral")])
def test_a_relative_path_is_sent_whole(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, inside: str, given: str
) -> None:
    """Hosts and engines have working directories of their own."""
    (checkpoint.path / "sub").mkdir(exist_ok=True)
    monkeypatch.chdir(checkpoint.path / inside)
    opened, _, name = open_model(config(model={"path": given}), lambda _stage, _share: None)
    assert opened.path.is_absolute() and opened.path.samefile(checkpoint.path)
    assert name == "mixtral"


def test_a_link_keeps_its_name(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lead elsewhere on another node, and is the name that the operator chose."""
    (tmp_path / "current").symlink_to(checkpoint.path)
    monkeypatch.chdir(tmp_path)
    opened, _, name = open_model(config(model={"path": "current"}), lambda _stage, _share: None)
    assert (opened.path, name) == (tmp_path / "current", "current")


def test_the_served_name_is_the_folder_s_unless_given() -> None:
    assert served_name(config(), Path("/models/mixtral")) == "mixtral"
    assert served_name(config(model={"name": "chat"}), Path("/models/mixtral")) == "chat"


def test_the_engine_s_waiting_threads_do_not_hold_their_cores() -> None:
    environment = engine_environment(config(engine={"threads": 3}))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["KMP_BLOCKTIME"] == "1"
    assert "OMP_WAIT_POLICY" not in environment
    assert all(isinstance(value, str) for value in environment.values())


def test_a_moved_host_keeps_to_its_groups_nodes_and_off_the_engines_memory(checkpoint: Checkpoint) -> None:
    settings = config(hosts=[{"name": "a"}, {"name": "b", "selector": {"zone": "!x"}}])
    made = planned(settings, checkpoint, 2)
    limits = made.deployment.limits
    assert limits.selectors == {"a-0": {}, "b-0": {"zone": "!x"}}
    assert limits.reserved_bytes == {
        made.engine_nodes[0].node_id: engine_memory(settings, checkpoint, "float32")
    }


def test_the_engine_is_told_what_to_do_without_a_replica(checkpoint: Checkpoint) -> None:
    settings = config(placement={"no_replica": "drop"}, data_plane={"min_deadline": "20ms"})
    told = router_spec(settings, planned(settings, checkpoint)).settings
    assert (told.no_replica, told.min_deadline_s) == ("drop", 0.02)


def test_the_engine_is_told_the_capacity_and_reads_it_back(checkpoint: Checkpoint) -> None:
    """As JSON, which the environment and a rehearsal carry."""
    settings = config(placement={"capacity": {"policy": "defer", "factor": 1.5}})
    told = router_spec(settings, planned(settings, checkpoint)).settings
    assert told.capacity == CapacitySettings("defer", factor=1.5)
    assert EngineSettings.read(json.loads(json.dumps(asdict(told)))).capacity == told.capacity
