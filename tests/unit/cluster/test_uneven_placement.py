"""Plans in which experts have unequal numbers of copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import PlacementConfig
from cluster.deal import apportion_copies, deal
from cluster.errors import PlacementError
from cluster.messages import HostSlot, MoeLayer
from cluster.placement import Plan, plan
from cluster.replication import copies_per_expert
from cluster.table import PlacementTable

PLENTY = 10**12


def host(name: str, node: str = "n", memory: int = PLENTY, threads: int = 4) -> HostSlot:
    return HostSlot(name, "g", "cpu", node, memory, threads)


def settings(replicas: object, **values: object) -> PlacementConfig:
    return PlacementConfig.model_validate({"replicas": replicas, **values})


def counts_of(layers: Sequence[MoeLayer]) -> dict[int, list[int]]:
    """How often each expert was chosen: unlike in every layer, with some ties."""
    return {
        layer.index: [(7 * layer.index + 5 * expert) % 11 for expert in range(layer.num_experts)]
        for layer in layers
    }


def planned(layers: Sequence[MoeLayer], hosts: Sequence[HostSlot], asked: PlacementConfig) -> Plan:
    return plan(layers, hosts, asked, item_bytes=2, counts=counts_of(layers))


def homes(result: Plan, hosts: Sequence[HostSlot]) -> dict[tuple[int, int], list[HostSlot]]:
    """(layer, expert) → the hosts that hold it."""
    return {
        (layer.index, expert): [
            h for h in hosts if expert in result.assignments[h.host_id].get(layer.index, ())
        ]
        for layer in result.layers
        for expert in range(layer.num_experts)
    }


def layers_of(sizes: list[tuple[int, int]]) -> list[MoeLayer]:
    return [MoeLayer(i, experts, 500 * size) for i, (experts, size) in enumerate(sizes)]


def layers(largest: int) -> st.SearchStrategy[list[MoeLayer]]:
    sizes = st.tuples(st.integers(1, 24), st.integers(1, largest))
    return st.lists(sizes, min_size=1, max_size=6).map(layers_of)


def hosts(memory: st.SearchStrategy[int]) -> st.SearchStrategy[list[HostSlot]]:
    rows = st.lists(st.tuples(st.integers(0, 3), memory, st.integers(1, 32)), min_size=1, max_size=7)
    return rows.map(lambda found: [host(f"h{i}", f"n{n}", m, t) for i, (n, m, t) in enumerate(found)])


numbers = st.integers(1, 4)
rules = st.fixed_dictionaries(
    {
        "default": numbers,
        "layers": st.dictionaries(st.just(0), numbers),
        "hottest": st.none()
        | st.fixed_dictionaries(
            {"share": st.sampled_from([0.1, 0.25, 0.5]), "replicas": numbers, "counts": st.just("-")}
        ),
    }
)
ample, scarce = hosts(st.just(PLENTY)), hosts(st.integers(0, 100_000))


@given(layers(3), ample | scarce, rules, st.sampled_from(["node", "host"]))
def test_every_expert_has_its_copies_or_the_plan_is_refused(
    layers: list[MoeLayer], hosts: list[HostSlot], rules: dict[str, Any], spread: str
) -> None:
    asked = settings(rules, spread=spread)
    try:
        result = planned(layers, hosts, asked)
    except PlacementError:
        return
    assert result == planned(layers, hosts, asked)
    assert result.copies == copies_per_expert(layers, asked.rules, counts_of(layers))
    found = homes(result, hosts)
    # As many hosts as copies, so that the loss of one leaves all that have two.
    assert all(len(where) == result.copies[layer][expert] for (layer, expert), where in found.items())
    assert sum(result.experts_by_host.values()) == sum(map(sum, result.copies.values()))
    assert all(result.bytes_by_host[h.host_id] <= h.memory_bytes for h in hosts)


@given(layers(3), ample, rules)
def test_copies_are_on_as_many_nodes_as_there_are(
    layers: list[MoeLayer], hosts: list[HostSlot], rules: dict[str, Any]
) -> None:
    nodes = len({h.node_id for h in hosts})
    try:
        result = planned(layers, hosts, settings(rules))
    except PlacementError as error:
        assert "hosts, there are" in error.message
        return
    for (layer, expert), where in homes(result, hosts).items():
        assert len({h.node_id for h in where}) == min(nodes, result.copies[layer][expert])


def room_for_all(copies: Sequence[int], caps: Sequence[int]) -> bool:
    """Whether parties with such room can hold so many copies of things, none twice (max flow, min cut)."""
    caps = sorted(caps, reverse=True)
    return all(
        sum(min(copy, k) for copy in copies) + sum(caps[k:]) >= sum(copies) for k in range(len(caps) + 1)
    )


@given(layers(1), hosts(st.integers(0, 100).map(lambda experts: 1000 * experts)), rules)
def test_with_experts_of_one_size_whatever_can_be_placed_is(
    layers: list[MoeLayer], hosts: list[HostSlot], rules: dict[str, Any]
) -> None:
    asked = settings(rules)
    flat = [
        copy for row in copies_per_expert(layers, asked.rules, counts_of(layers)).values() for copy in row
    ]
    by_node: dict[str, int] = {}
    for h in hosts:
        by_node[h.node_id] = by_node.get(h.node_id, 0) + h.memory_bytes // 1000
    try:
        result = planned(layers, hosts, asked)
    except PlacementError:
        assert not room_for_all(flat, [h.memory_bytes // 1000 for h in hosts])
        return
    assert room_for_all(flat, [h.memory_bytes // 1000 for h in hosts])
    if max(flat) <= len(by_node) and room_for_all(flat, list(by_node.values())):
        for where in homes(result, hosts).values():
            assert len({h.node_id for h in where}) == len(where)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_equal_hosts_share_every_layer_and_are_asked_first_alike(nodes: int) -> None:
    layers = layers_of([(24, 1)] * 6)
    hosts = [host(f"h{i}", f"n{i * nodes // 4}") for i in range(4)]
    hottest = {"share": 0.25, "replicas": 3, "counts": "-"}
    result = planned(layers, hosts, settings({"default": 2, "layers": {3: 3}, "hottest": hottest}))
    table = PlacementTable.from_plan(result, "m")
    for layer in layers:
        held = [len(result.assignments[h.host_id][layer.index]) for h in hosts]
        assert max(held) - min(held) <= 1
        first = [table.replicas(layer.index, expert)[0] for expert in range(24)]
        assert {first.count(h.host_id) for h in hosts} == {6}


def test_shares_follow_the_hosts_speed_and_leave_no_layer_out() -> None:
    layers = layers_of([(24, 1)] * 6)
    hosts = [host("fast", threads=12), host("a"), host("b")]
    result = planned(layers, hosts, settings({"layers": {2: 2}}))
    for layer in (0, 1, 3, 4, 5):
        held = {h.host_id: len(result.assignments[h.host_id][layer]) for h in hosts}
        assert held["fast"] in (15, 16) and held["a"] in (4, 5) and held["b"] in (4, 5)


def test_a_plain_number_over_too_few_nodes_still_survives_the_loss_of_either() -> None:
    hosts = [host(f"h{i}", "large") for i in range(4)] + [host("h4", "small")]
    result = planned(layers_of([(24, 1)] * 3), hosts, settings(3))
    assert all(len({h.node_id for h in where}) == 2 for where in homes(result, hosts).values())


def test_too_little_memory_says_what_is_wanted() -> None:
    hosts = [host("a", memory=30_000), host("b", memory=1000), host("c", memory=1000)]
    with pytest.raises(PlacementError) as caught:
        planned(layers_of([(8, 1), (8, 1)]), hosts, settings({"layers": {0: 2}}))
    assert "(1 to 2 copies of 0.02 MiB)" in caught.value.message
    assert "lower placement.replicas" in caught.value.hint
    with pytest.raises(PlacementError, match="4 copies of an expert need 4 hosts, there are 3"):
        planned(layers_of([(8, 1)] * 2), hosts, settings({"layers": {0: 4}}))


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(0, 2)), min_size=4, max_size=6),
)
def test_deal_gives_every_party_its_total(
    rounds: list[list[int]], parties: list[tuple[int, int, int]]
) -> None:
    weights, caps, groups = zip(*parties, strict=True)
    flat = [copies for things in rounds for copies in things]
    totals = apportion_copies(flat, weights, caps)
    assert all(total <= cap for total, cap in zip(totals, caps, strict=True))
    assert (sum(totals) == sum(flat)) == room_for_all(flat, caps)
    if sum(totals) < sum(flat):
        with pytest.raises(ValueError, match="cannot be dealt"):
            deal(rounds, totals, groups)
        return
    dealt = deal(rounds, totals, groups)
    assert [[len(set(chosen)) for chosen in things] for things in dealt] == rounds
    every = [party for things in dealt for chosen in things for party in chosen]
    assert [every.count(party) for party in range(len(parties))] == totals
