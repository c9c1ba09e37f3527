from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import PlacementConfig
from cluster.errors import PlacementError, ProtocolError
from cluster.messages import HostAddress, HostSlot, MoeLayer
from cluster.placement import Plan, plan
from cluster.table import PlacementTable

MANIFEST = "ab" * 32
LAYERS = (MoeLayer(1, 6, 10), MoeLayer(3, 4, 10))


def planned(hosts: int, replicas: int, layers: tuple[MoeLayer, ...] = LAYERS) -> Plan:
    slots = [HostSlot(f"h{i}", "g", "cpu", f"n{i}", 10**9, 4) for i in range(hosts)]
    return plan(layers, slots, PlacementConfig(replicas=replicas), item_bytes=2)


def address(host_id: str) -> HostAddress:
    return HostAddress(host_id, "n", f"expertmesh-{host_id}", "10.0.0.1:7000", 42)


def running(*host_ids: str, hosts: int = 3, replicas: int = 2) -> PlacementTable:
    table = PlacementTable.from_plan(planned(hosts, replicas), MANIFEST)
    return table.next_epoch(hosts={host_id: address(host_id) for host_id in host_ids})


def test_a_plans_table_has_its_hosts_and_no_address() -> None:
    table = PlacementTable.from_plan(planned(2, 1), MANIFEST)
    assert (table.epoch, table.hosts, table.running) == (0, {"h0": None, "h1": None}, ())
    assert table.complete(LAYERS) == [(1, e) for e in range(6)] + [(3, e) for e in range(4)]
    assert table.host_matrix(1) == [-1] * 6


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 50))
def test_the_table_names_exactly_the_hosts_that_the_plan_chose(
    hosts: int, replicas: int, experts: int
) -> None:
    replicas = min(replicas, hosts)
    chosen = planned(hosts, replicas, (MoeLayer(0, experts, 10),))
    table = PlacementTable.from_plan(chosen, MANIFEST)
    for expert in range(experts):
        holders = table.replicas(0, expert)
        assert len(holders) == replicas
        assert set(holders) == {h for h, held in chosen.assignments.items() if expert in held.get(0, ())}


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 50))
def test_equal_hosts_are_asked_first_about_equally_often(hosts: int, replicas: int, experts: int) -> None:
    replicas = min(replicas, hosts)
    table = PlacementTable.from_plan(planned(hosts, replicas, (MoeLayer(0, experts, 10),)), MANIFEST)
    first = Counter(table.replicas(0, expert)[0] for expert in range(experts))
    assert max(first.values()) <= experts / hosts + 2
    assert hosts * 4 > experts or min(first[f"h{i}"] for i in range(hosts)) >= experts / hosts - 2


def test_next_epoch_changes_a_copy() -> None:
    before = running("h0", "h1", "h2")
    after = before.next_epoch(hosts={"h1": None}, manifest="cd" * 32)
    assert (before.epoch, after.epoch) == (1, 2)
    assert before.manifest == MANIFEST and after.manifest == "cd" * 32
    assert before.hosts["h1"] == address("h1") and after.hosts["h1"] is None
    assert after.hosts["h2"] == address("h2") and after.experts == before.experts
    assert before.next_epoch().epoch == 2


def test_next_epoch_refuses_strangers() -> None:
    for hosts in ({"h9": address("h9")}, {"h9": None}, {"h0": address("h1")}):
        with pytest.raises(PlacementError, match="is not in the placement table"):
            running().next_epoch(hosts=hosts)


def test_a_dead_hosts_experts_are_answered_by_the_others() -> None:
    table = running("h0", "h1", "h2")
    dead = table.next_epoch(hosts={"h1": None})
    assert [host.host_id for host in dead.running] == ["h0", "h2"]
    assert dead.complete(LAYERS) == []
    for layer in LAYERS:
        for expert, position in enumerate(dead.host_matrix(layer.index)):
            asked = dead.running[position].host_id
            order = [host for host in table.replicas(layer.index, expert) if host != "h1"]
            assert asked == order[0]


def test_what_no_running_host_holds_is_missing() -> None:
    table = running("h0", hosts=2, replicas=1)
    missing = table.complete(LAYERS)
    assert missing == [
        (layer.index, e) for layer in LAYERS for e in range(layer.num_experts // 2, layer.num_experts)
    ]
    assert [position for position in table.host_matrix(3)] == [0, 0, -1, -1]


def test_layers_and_experts_beyond_the_table_are_missing() -> None:
    table = running("h0", "h1", "h2")
    assert table.complete([MoeLayer(1, 8, 10), MoeLayer(2, 1, 10)]) == [(1, 6), (1, 7), (2, 0)]


host_ids = st.text(max_size=12)
some_tables = st.dictionaries(
    host_ids,
    st.none() | st.tuples(host_ids, host_ids, host_ids, st.integers(0, 2**40)),
    min_size=1,
    max_size=5,
).flatmap(
    lambda hosts: st.builds(
        PlacementTable,
        manifest=host_ids,
        epoch=st.integers(0, 2**60),
        hosts=st.just({h: row and HostAddress(h, *row) for h, row in hosts.items()}),
        experts=st.dictionaries(
            st.integers(0, 200),
            st.lists(
                st.lists(st.sampled_from(sorted(hosts)), unique=True, min_size=1).map(tuple), max_size=9
            ).map(tuple),
            max_size=4,
        ),
    )
)


@given(some_tables)
def test_json_round_trip(table: PlacementTable) -> None:
    again = PlacementTable.from_json(table.to_json())
    assert again == table
    # `running` and `host_matrix` count in the order of the hosts, which plain equality would not see.
    assert list(again.hosts) == list(table.hosts)
    assert PlacementTable.from_json(table.to_json().encode()) == table


def broken(**changes: Any) -> str:
    return json.dumps({**json.loads(running("h0", "h1", "h2").to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (broken(version=2, novelty=1), "placement table of version 2, this process reads 1"),
        (broken(novelty=1), "novelty: Extra inputs"),
        (broken(epoch=-1), "epoch: Input should be greater"),
        (broken(manifest=None), "manifest: Input should be a valid string"),
        (broken(hosts={"h0": {"host_id": "h0"}}), "hosts.h0.node_id: Field required"),
        (broken(experts={"1": [[3]]}), r"layer 1, expert 0: \[3\]"),
        (broken(experts={"1": [[0], [1, 1]]}), r"layer 1, expert 1: \[1, 1\]"),
        (broken(experts={"1": [[]]}), r"layer 1, expert 0: \[\]"),
        (broken(experts={"1": [[-1]]}), "experts.1.0.0: Input should be greater"),
        (broken(experts={"x": []}), "experts.x"),
        ("{", "text: Invalid JSON"),
        ("[]", "malformed placement table"),
    ],
)
def test_what_is_no_table_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        PlacementTable.from_json(text)


def test_an_address_under_another_hosts_name_is_refused() -> None:
    hosts = json.loads(running("h0", "h1", "h2").to_json())["hosts"]
    with pytest.raises(ProtocolError, match="host h0 with h1's address"):
        PlacementTable.from_json(broken(hosts={**hosts, "h0": hosts["h1"]}))


def test_a_digest_names_the_content() -> None:
    table = running("h0", "h1")
    assert table.digest == PlacementTable.from_json(table.to_json()).digest and len(table.digest) == 16
    others = [running("h0"), running("h0", "h1", replicas=1), table.next_epoch()]
    assert len({table.digest, *(other.digest for other in others)}) == 4
