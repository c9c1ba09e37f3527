from __future__ import annotations

import io
from decimal import Decimal
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from cluster.config import PlacementConfig, load_config
from cluster.messages import HostSlot, MoeLayer, NodeInfo
from cluster.placement import plan
from workloads.config_view import config_table, plan_json, plan_table, show_duration, show_size


def lines(table: Table) -> list[str]:
    """The table as a terminal shows it, one blank between words."""
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return [" ".join(line.split()) for line in console.export_text().splitlines() if line.strip()]


def test_every_value_is_shown_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "expertmesh.yaml").write_text(
        "engine:\n  kv_cache: 1536MiB\nserver: {api_keys: [hush, hush2]}\n"
        "placement: {replicas: {hottest: {share: 0.25, replicas: 1, counts: c.json}}}\n"
        "versions: {options: {secret: hush, client_kwargs: {aws_secret_access_key: hush, region_name: eu}}}\n"
    )
    environ = {"EXPERTMESH__ENGINE__OPTIONS__HF_TOKEN": "hush", "EXPERTMESH__ENGINE__OPTIONS__SEED": "7"}
    rows = lines(config_table(load_config(None, {"data_plane.deadline": "500ms"}, environ)))
    assert rows[0] == "Key Value From"
    for expected in (
        "engine.kv_cache 1.5GiB file expertmesh.yaml:2",
        "engine.enforce_eager false default",
        "engine.max_model_len null default",
        "engine.options.seed 7 environment EXPERTMESH__ENGINE__OPTIONS__SEED",
        "engine.options.hf_token ******** environment EXPERTMESH__ENGINE__OPTIONS__HF_TOKEN",
        "server.api_keys [********, ********] file expertmesh.yaml:3",
        "data_plane.deadline 500ms flag --deadline",
        "data_plane.connect_timeout 60s default",
        "ray.token_path null default",
        "placement.replicas.hottest.share 0.25 file expertmesh.yaml:4",
        "versions.options.secret ******** file expertmesh.yaml:5",
        "versions.options.client_kwargs {'aws_secret_access_key': '********', 'region_name': 'eu'} "
        "file expertmesh.yaml:5",
    ):
        assert expected in rows
    assert "hush" not in str(rows)


def test_the_plan_shows_hosts_nodes_experts_and_memory() -> None:
    slots = [
        HostSlot("h0", "g", "cuda", "node0-long-id", 2**30, 4, Decimal("0.0313")),
        HostSlot("h1", "g", "cpu", "node1-long-id", 2**30, 4),
    ]
    nodes = [NodeInfo("node0-long-id", "", "alpha", 4, 0, 2**33)]
    layers = [MoeLayer(i, 8, 2**24) for i in range(3)] + [MoeLayer(3, 4, 2**24)]
    placed = plan(layers, slots, PlacementConfig(), item_bytes=2)
    assert lines(plan_table(placed, slots, nodes)) == [
        "Host Node Device Experts per layer Threads Experts Memory Limit Used",
        "h0 alpha 0.0313 cuda 4 in 0-2, 2 in 3 4 14 448 MiB 1 GiB 44%",
        # A node that is gone is named by the beginning of its id.
        "h1 node1-lo cpu 4 in 0-2, 2 in 3 4 14 448 MiB 1 GiB 44%",
        "all 28 896 MiB 2 GiB 44%",
    ]
    told = plan_json(placed, slots, nodes)["hosts"]
    assert {host_id: (host["node"], host["bytes"]) for host_id, host in told.items()} == {
        "h0": ("alpha", 14 * 2**25),
        "h1": ("node1-long-id", 14 * 2**25),
    }
    assert told["h0"]["experts"] == {layer: list(held) for layer, held in placed.assignments["h0"].items()}


def test_the_plan_shows_the_numbers_of_copies() -> None:
    slots = [HostSlot(f"h{i}", "g", "cpu", "n", 2**30, 4) for i in range(3)]
    layers = [MoeLayer(i, 4, 1) for i in range(4)]

    def shown(replicas: object) -> str:
        settings = PlacementConfig.model_validate({"replicas": replicas})
        counts = {layer.index: [0, 0, layer.index % 2, 1] for layer in layers}
        return lines(plan_table(plan(layers, slots, settings, item_bytes=2, counts=counts), slots, []))[-1]

    assert shown(1).startswith("all 16 ")
    assert shown(2).startswith("all 2 copies 32 ")
    assert shown({"layers": {2: 2}}).startswith(
        "all 1 copy of 4 in 0-1; 2 copies of 4 in 2; 1 copy of 4 in 3"
    )
    hottest = {"share": 0.25, "replicas": 3, "counts": "-"}
    assert shown({"default": 2, "hottest": hottest}).startswith("all 2 copies of 3, 3 of 1 in 0-3 36 ")


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB"), (2**41, "2 TiB")],
)
def test_sizes(size: int, shown: str) -> None:
    assert show_size(size) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, "0s"), (90.0, "90s"), (0.5, "500ms"), (2e-5, "20us")])
def test_durations(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown
