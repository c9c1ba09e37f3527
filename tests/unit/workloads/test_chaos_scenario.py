"""Scenarios: what is shipped is right, what is wrong is named, and a seed decides the faults."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import Config
from cluster.errors import ConfigError
from tests.unit.test_imports import ROOT
from workloads.bench.chaos_mesh import own_cluster
from workloads.bench.chaos_plan import plan
from workloads.bench.chaos_scenario import Event, Scenario, deploy, load_scenario, shipped

HOSTS = ("local-0", "local-1", "local-2")


def scenario(**fields: object) -> Scenario:
    base = {"name": "mine", "description": "d", "events": [{"action": "kill", "host": "any", "at": [1, 9]}]}
    return Scenario.model_validate({**base, **fields})


def written(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


@pytest.mark.parametrize("name", shipped())
def test_what_is_shipped_loads_and_deploys_and_has_its_hosts(name: str) -> None:
    found = load_scenario(name)
    assert found.name == name
    config = deploy(found, Config())
    hosts = [f"{group.name}-{number}" for group in config.hosts for number in range(group.count)]
    zones = [node.zone for node in found.cluster.nodes] if found.cluster else ()
    planned = plan(found, hosts, 0, zones)
    assert planned and max(event.at_s for event in planned) < found.load.duration
    assert found.checks.changed_tokens == 0 and found.checks.short_answers == 0


def test_the_shipped_ones() -> None:
    wanted = (
        "kill-host kill-two-hosts freeze-host slow-host lose-node cut-network kill-unreplicated kill-controller "
        "restart-head kill-router memory-limit scale drain-node"
    )
    assert set(wanted.split()) == set(shipped())


@given(st.integers(0, 2**32))
def test_a_seed_decides_times_and_targets(seed: int) -> None:
    both = scenario(
        events=[
            {"action": "stop", "host": "any", "at": ["1s", "2s"]},
            {"action": "continue", "host": "same", "after": "500ms"},
            {"action": "kill", "host": "other", "after": "1s"},
            {"action": "kill", "process": "controller", "at": 8},
        ]
    )
    planned = plan(both, HOSTS, seed)
    assert planned == plan(both, tuple(reversed(HOSTS)), seed)
    stop, go_on, kill, controller = planned
    assert 1 <= stop.at_s <= 2 and go_on.at_s == stop.at_s + 0.5 and kill.at_s == go_on.at_s + 1
    assert stop.host == go_on.host != kill.host
    assert (controller.at_s, controller.target, controller.host) == (8, "controller", None)


def test_the_end_of_a_fault_is_none() -> None:
    found = {
        name: [event.hurts for event in plan(load_scenario(name), HOSTS, 0, ("a", "far"))]
        for name in shipped()
    }
    assert found["freeze-host"] == found["slow-host"] == found["cut-network"] == [True, False]
    assert found["restart-head"] == [True, False, True]
    assert found["kill-two-hosts"] == [True, True]


def test_seeds_differ_and_hit_every_host() -> None:
    planned = [plan(scenario(), HOSTS, seed)[0] for seed in range(40)]
    assert {event.host for event in planned} == set(HOSTS)
    assert len({event.at_s for event in planned}) == 40


def test_no_host_is_hurt_twice_in_a_row() -> None:
    one = scenario(events=[{"action": "kill", "host": "any", "at": 1}])
    targets = [plan(one, HOSTS, seed)[0].host for seed in range(10)]
    assert all(before != after for before, after in pairwise(targets))


def test_events_come_in_order_of_time() -> None:
    late_first = scenario(
        events=[
            {"action": "kill", "host": "local-0", "at": 5},
            {"action": "kill", "host": "local-1", "at": 2},
        ]
    )
    assert [event.host for event in plan(late_first, HOSTS, 0)] == ["local-1", "local-0"]


@pytest.mark.parametrize("host", ["local-7", "other"])
def test_a_host_that_is_not_there(host: str) -> None:
    events = [{"action": "kill", "host": "any", "at": 1}, {"action": "kill", "host": host, "at": 2}]
    with pytest.raises(ConfigError, match=host) as error:
        plan(scenario(events=events), ("local-0",), 0)
    assert "local-0" in error.value.hint


NODES = {"nodes": [{"zone": "a"}, {"zone": "b", "namespace": True}, {"zone": "c", "namespace": True}]}


def test_nodes_are_chosen_of_those_with_hosts_and_to_which_it_can_be_done() -> None:
    events = [
        {"action": "cut", "node": "any", "at": 1},
        {"action": "heal", "node": "same", "after": 1},
        {"action": "kill", "node": "other", "after": 1},
    ]
    both = scenario(events=events, cluster=NODES)
    for seed in range(20):
        cut, heal, kill = plan(both, HOSTS, seed, zones=("a", "b"))
        assert cut.node == heal.node == "b" and kill.node == "a" and kill.kills and not cut.kills
        assert (cut.target, cut.hurts, heal.hurts) == ("node b", True, False)
    assert {plan(both, HOSTS, seed, zones=("b", "c"))[0].node for seed in range(20)} == {"b", "c"}
    with pytest.raises(ConfigError, match="no node 'any' to choose"):
        plan(both, HOSTS, 0, zones=("a",))
    assert both.wants_namespaces and not scenario().wants_namespaces


BAD = {
    "an unknown key": ("descriptoin: x", "descriptoin = 'x': unknown key", "description"),
    "an unknown check": ("checks: {gaps: 3}", "checks.gaps = 3: unknown key", "errors"),
    "an unknown action": ("events: [{action: bomb, host: any, at: 1}]", "'bomb'", "kill"),
    "no target": ("events: [{action: kill, at: 1}]", "names no target", "process"),
    "two targets": ("events: [{action: kill, host: any, process: router, at: 1}]", "or two", "process"),
    "no time": ("events: [{action: kill, host: any}]", "has no time", "after"),
    "a window backwards": ("events: [{action: kill, host: any, at: [4s, 2s]}]", "before it begins", "from"),
    "a bad time": ("events: [{action: kill, host: any, at: soon}]", "duration", "shipped"),
    "half a failpoint": ("events: [{action: failpoint, host: any, at: 1}]", "belong together", "slow"),
    "nothing before": ("events: [{action: kill, host: any, after: 1s}]", "after nothing", "at"),
    "same as nobody": ("events: [{action: kill, host: same, at: 1}]", "no earlier one", ""),
    "no events": ("events: []", "no events", "one"),
    "a node that is killed and is not there": (
        "events: [{action: kill, node: a, at: 1}]",
        "no such node",
        "nodes",
    ),
    "a cut without a network": (
        "cluster: {nodes: [{zone: a}]}\nevents: [{action: cut, node: a, at: 1}]",
        "no such node to cut",
        "namespace",
    ),
    "a node that is stopped": (
        "cluster: {nodes: [{zone: a}]}\nevents: [{action: stop, node: a, at: 1}]",
        "stop can't be done",
        "cut",
    ),
    "a head that is frozen": (
        "events: [{action: stop, process: head, at: 1}]",
        "stop can't be done",
        "restarted",
    ),
    "a router that is restarted": (
        "events: [{action: restart, process: router, at: 1}]",
        "can't be done",
        "head",
    ),
    "a head without a store": (
        "events: [{action: kill, process: head, at: 1}]",
        "start from again",
        "persistent",
    ),
    "two nodes of one zone": ("cluster: {nodes: [{zone: a}, {zone: a}]}", "one zone", "its own"),
    "no streams": ("load: {streams: 0}", "load.streams", "16"),
}


@pytest.mark.parametrize(("line", "problem", "way_out"), BAD.values(), ids=list(BAD))
def test_mistakes_are_named_with_their_line(tmp_path: Path, line: str, problem: str, way_out: str) -> None:
    rest = "" if "events:" in line else "events: [{action: kill, host: any, at: 1}]\n"
    with pytest.raises(ConfigError) as error:
        load_scenario(written(tmp_path, f"description: d\n{rest}{line}\n"))
    assert "mine.yaml" in error.value.message and problem in error.value.message
    assert way_out in error.value.hint


def test_malformed_yaml_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine.yaml:2: not valid YAML"):
        load_scenario(written(tmp_path, "events: [\n"))
    with pytest.raises(ConfigError, match=r"the scenario .* cannot be read") as error:
        load_scenario(str(tmp_path / "none.yaml"))
    assert "--config" not in error.value.hint
    with pytest.raises(ConfigError, match="no scenario 'kill-hots'") as error:
        load_scenario("kill-hots")
    assert "did you mean kill-host?" in error.value.hint


def test_a_file_says_its_own_name(tmp_path: Path) -> None:
    path = written(tmp_path, "description: d\nevents: [{action: kill, host: any, at: 1}]\n")
    assert load_scenario(path).name == "mine"


def test_a_deployment_is_merged_and_the_rest_kept() -> None:
    base = Config.model_validate(
        {"engine": {"threads": 1, "kv_cache": "64MiB"}, "server": {"api_keys": ["k"], "port": 1234}}
    )
    found = deploy(scenario(deployment={"hosts": [{"count": 3}], "engine": {"threads": 2}}), base)
    assert (found.hosts[0].count, found.engine.threads, int(found.engine.kv_cache)) == (3, 2, 64 * 2**20)
    assert (found.server.api_keys, found.server.port) == ((), 1234)
    assert deploy(scenario(), base, server={"port": 99}).server.port == 99


def test_a_wrong_deployment_names_scenario_and_key() -> None:
    with pytest.raises(
        ConfigError, match=r"scenario mine, deployment: placement\.replica: unknown key"
    ) as error:
        deploy(scenario(deployment={"placement": {"replica": 2}}), Config())
    assert "replicas" in error.value.hint
    with pytest.raises(ConfigError, match="as many hosts"):
        deploy(scenario(deployment={"placement": {"replicas": 2}, "hosts": [{"count": 1}]}), Config())


def test_somebody_elses_cluster_is_left_alone() -> None:
    own_cluster(Config())
    with pytest.raises(ConfigError, match="auto"):
        own_cluster(Config.model_validate({"ray": {"address": "auto"}}))


def test_listing_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from workloads.bench.chaos_scenario import load_scenario, shipped; "
        "[load_scenario(name) for name in shipped()]; "
        "print([m for m in ('torch', 'ray', 'vllm', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"action": "scale", "group": "local"}, "scale and value belong together"),
        ({"action": "scale", "value": 3}, "scale is of a group"),
        ({"action": "drain", "host": "any"}, "drain is of a node"),
        ({"action": "rebalance", "process": "head"}, "rebalance is of the whole mesh"),
        ({"action": "kill", "group": "local", "host": "any"}, "only scale has a group"),
    ],
)
def test_changes_name_what_they_are_of(event: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Event.model_validate({**event, "at": 1})
