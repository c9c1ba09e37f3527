"""`expertmesh bench placement` on a made-up trace: baselines, judgement, report, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError
from cluster.fleet import HostCost
from workloads.bench.placement import Settings, measure
from workloads.bench.placement_baselines import at_random, eplb, even_levels, round_robin
from workloads.bench.placement_replay import EvenLevels, SplitLevels, judge
from workloads.bench.placement_trace import Trace, read_trace, scaled
from workloads.cli import app

LAYERS, TOKENS, EXPERTS, TOP_K = 2, 3000, 16, 2


def write_trace(file: Path, seed: int) -> Path:
    """Experts by Zipf's law, in another order for each layer and seed, that drifts a little over time."""
    rng = np.random.default_rng(seed)
    ids = np.empty((LAYERS, TOKENS, TOP_K), np.uint8)
    for layer in range(LAYERS):
        order = rng.permutation(EXPERTS)
        share = 1 / np.arange(1, EXPERTS + 1)
        ids[layer] = order[rng.choice(EXPERTS, (TOKENS, TOP_K), p=share / share.sum())]
    ids[0, 0, 0] = EXPERTS - 1
    np.savez(file, expert_ids=ids)
    return file


def test_eplb_gives_copies_to_the_hottest_and_the_hottest_a_host_of_its_own() -> None:
    experts, hosts = eplb(np.array([8.0, 2.0, 2.0]), np.array([2, 2]))
    assert sorted(experts.tolist()) == [0, 0, 1, 2]
    assert sorted(hosts[experts == 0].tolist()) == [0, 1]
    assert even_levels((experts, hosts), np.array([8.0, 2.0, 2.0]), 2).tolist() == [6.0, 6.0]


@pytest.mark.parametrize("slots", [[3, 3, 3], [5, 1, 2]])
def test_baselines_fill_every_slot_and_leave_out_no_expert(slots: list[int]) -> None:
    room, load = np.array(slots), np.arange(1.0, 7.0)
    for experts, hosts in (
        eplb(load, room),
        round_robin(6, room),
        at_random(6, room, np.random.default_rng(0)),
    ):
        assert np.bincount(hosts, minlength=3).tolist() == slots
        assert set(experts.tolist()) == set(range(6))


def test_judgement_of_known_loads() -> None:
    trace = Trace("t", np.array([[[0], [0], [0], [1]]]), 2)
    costs = [HostCost(per_row_s=1.0)] * 2
    apart = EvenLevels([(np.array([0, 1]), np.array([0, 1]))], costs)
    judged = judge(trace, 0, 4, 2, apart, apart)
    assert judged.balancedness == pytest.approx(2 / 3)
    assert (judged.step_p50_s, judged.step_p99_s) == (1.5, pytest.approx(1.99))
    shared = SplitLevels([[[0, 1], [1]]], costs)
    assert judge(trace, 0, 4, 2, shared, shared).balancedness == pytest.approx(1.0)


def test_the_whole_report(tmp_path: Path) -> None:
    settings = Settings(
        write_trace(tmp_path / "a.npz", 0),
        write_trace(tmp_path / "b.npz", 1),
        hosts=(4,),
        redundancies=(1.0, 1.25),
        tries=500,
    )
    report, planned = measure(settings, lambda text: None)
    rows = {(row["method"], row["redundancy"]): row for row in report["results"]}
    assert {method for method, _ in rows} == {"ours", "eplb", "round_robin", "random"}
    assert rows["ours", 1.25]["balancedness"] > rows["eplb", 1.25]["balancedness"]
    assert rows["eplb", 1.25]["balancedness"] > rows["random", 1.25]["balancedness"]
    assert rows["ours", 1.25]["moved_blobs"] == 4 * 5 * LAYERS and len(planned.layers) == LAYERS
    assert report["shift"]["online"] > report["shift"]["before"]


def test_the_command(tmp_path: Path) -> None:
    file = write_trace(tmp_path / "a.npz", 0)
    arguments = [
        "bench",
        "placement",
        "--trace",
        str(file),
        "--hosts",
        "4",
        "--redundancy",
        "1.25",
        "--tries",
        "50",
    ]
    done = CliRunner().invoke(
        app, [*arguments, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["results"][0]) == {
        "method", "hosts", "redundancy", "balancedness", "step_time", "step_time_p99", "moved_blobs", "plan_s",
    }  # fmt: skip
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_no_trace_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no routing trace"):
        read_trace(tmp_path / "none.npz")
    np.savez(tmp_path / "flat.npz", expert_ids=np.zeros((3, 4), np.uint8))
    with pytest.raises(ConfigError, match=r"uint8 \[3, 4\]"):
        read_trace(tmp_path / "flat.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ConfigError, match="can't be read"):
        read_trace(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(ConfigError, match="expert_ids"):
        read_trace(tmp_path / "other.npz")


@pytest.mark.parametrize("hosts", ["", "8,x", "0", "8,,16"])
def test_numbers_that_are_none_are_told(tmp_path: Path, hosts: str) -> None:
    file = write_trace(tmp_path / "a.npz", 0)
    done = CliRunner().invoke(app, ["bench", "placement", "--trace", str(file), "--hosts", hosts])
    assert done.exit_code != 0 and "--hosts" in str(done.exception or done.output)


def write_fleet(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_a_described_fleet(tmp_path: Path) -> None:
    fleet = write_fleet(
        tmp_path / "fleet.yaml",
        "groups: [{name: gpu, count: 1, slots: 8, speed: 16, device: cuda}, {name: cpu, count: 3, slots: 4}]",
    )
    settings = Settings(write_trace(tmp_path / "a.npz", 0), fleet=fleet, tries=500)
    report, planned = measure(settings, lambda text: None)
    assert planned.hosts == ("gpu-0", "cpu-0", "cpu-1", "cpu-2")
    rows = {row["method"]: row for row in report["results"]}
    assert rows["ours"]["step_time"] * 1.5 < rows["eplb"]["step_time"]
    assert rows["ours"]["redundancy"] == pytest.approx(20 / 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("groups: []", "groups"),
        ("groups: [{name: a, count: 1, slots: 2, sped: 3}]", "sped"),
        ("groups: [{name: a, count: 0, slots: 2}]", "count"),
        ("a: [", "no YAML"),
        ("groups: [{name: a, count: 1, slots: 2}]", "2 slots for a layer's 16 experts"),
    ],
)
def test_a_fleet_that_makes_no_sense_is_told(tmp_path: Path, text: str, words: str) -> None:
    settings = Settings(write_trace(tmp_path / "a.npz", 0), fleet=write_fleet(tmp_path / "fleet.yaml", text))
    with pytest.raises(ConfigError, match=words):
        measure(settings, lambda text: None)


def test_a_scaled_trace_keeps_the_shape_of_its_loads(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "a.npz", 0))
    large = scaled(trace, 5, 4 * EXPERTS)
    assert (large.layers, large.tokens, large.top_k, large.num_experts) == (5, TOKENS, TOP_K, 4 * EXPERTS)
    blocks = large.counts(0, TOKENS)[0].reshape(4, EXPERTS)
    assert blocks.sum(axis=1).tolist() == [TOKENS * TOP_K / 4] * 4
    source = trace.counts(0, TOKENS)[0] / 4
    assert np.abs(blocks[0] - source).max() < 0.2 * source.max()
    with pytest.raises(ConfigError, match="multiple of 16"):
        scaled(trace, 5, 40)
