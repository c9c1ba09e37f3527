from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.apportion import apportion
from cluster.config import PlacementConfig
from cluster.errors import ConfigError, PlacementError
from cluster.messages import HostSlot, MoeLayer, NodeInfo
from cluster.placement import Plan, plan

GIB = 2**30
PLENTY = 10**15


def host(
    name: str, *, node: str = "n", memory: int = PLENTY, threads: int = 4, device: str = "cpu"
) -> HostSlot:
    return HostSlot(name, "g", device, node, memory, threads, Decimal(device == "cuda"))


def settings(replicas: int = 1, **values: object) -> PlacementConfig:
    return PlacementConfig.model_validate({"replicas": replicas, **values})


def counts(result: Plan, layer: int) -> dict[str, int]:
    return {host_id: len(held.get(layer, ())) for host_id, held in result.assignments.items()}


def assert_covers(result: Plan, layers: Sequence[MoeLayer], replicas: int) -> None:
    """Every expert of every layer on exactly `replicas` distinct hosts, and nothing else."""
    for layer in layers:
        held = Counter[int]()
        for by_layer in result.assignments.values():
            experts = by_layer.get(layer.index, ())
            assert len(set(experts)) == len(experts)
            held.update(experts)
        assert held == dict.fromkeys(range(layer.num_experts), replicas)
    known = {layer.index for layer in layers}
    assert all(set(by_layer) <= known for by_layer in result.assignments.values())


some_layers = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(
    lambda sizes: [MoeLayer(3 * i, size, 1000) for i, size in enumerate(sizes)]
)
uneven_layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=8).map(
    lambda sizes: [MoeLayer(i, size, 500 * each) for i, (size, each) in enumerate(sizes)]
)
some_hosts = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 64), st.sampled_from(["cpu", "cpu", "cuda"])),
    min_size=1,
    max_size=7,
).map(lambda rows: [host(f"h{i}", node=f"n{n}", threads=t, device=d) for i, (n, t, d) in enumerate(rows)])


@given(uneven_layers, some_hosts, st.integers(1, 4), st.sampled_from(["node", "host"]))
def test_every_expert_is_on_exactly_as_many_hosts_as_asked(
    layers: list[MoeLayer], hosts: list[HostSlot], replicas: int, spread: str
) -> None:
    replicas = min(replicas, len(hosts))
    result = plan(layers, hosts, settings(replicas, spread=spread), item_bytes=2)
    assert_covers(result, layers, replicas)


@given(some_layers, st.integers(1, 9), st.integers(1, 4))
def test_equal_hosts_share_every_layer_within_one(layers: list[MoeLayer], count: int, replicas: int) -> None:
    replicas = min(replicas, count)
    result = plan(layers, [host(f"h{i}") for i in range(count)], settings(replicas), item_bytes=2)
    for layer in layers:
        held = counts(result, layer.index).values()
        assert max(held) - min(held) <= 1
    # Nor may the remainders of the layers pile up on one host.
    totals = result.experts_by_host.values()
    assert max(totals) - min(totals) <= 1


@given(some_layers, st.integers(2, 4), st.integers(1, 3))
def test_equal_nodes_share_every_layer_within_one(layers: list[MoeLayer], nodes: int, width: int) -> None:
    hosts = [host(f"h{n}-{i}", node=f"n{n}") for n in range(nodes) for i in range(width)]
    result = plan(layers, hosts, settings(2), item_bytes=2)
    for layer in layers:
        held = counts(result, layer.index).values()
        assert max(held) - min(held) <= 1


@given(uneven_layers, st.lists(st.integers(0, 60_000), min_size=1, max_size=6), st.integers(1, 3))
def test_no_host_holds_more_than_its_memory(layers: list[MoeLayer], memory: list[int], replicas: int) -> None:
    hosts = [host(f"h{i}", memory=limit) for i, limit in enumerate(memory)]
    try:
        result = plan(layers, hosts, settings(replicas), item_bytes=2)
    except PlacementError:
        return
    assert_covers(result, layers, replicas)
    for slot in hosts:
        size = sum(
            len(experts) * next(layer.expert_parameters for layer in layers if layer.index == index) * 2
            for index, experts in result.assignments[slot.host_id].items()
        )
        assert size == result.bytes_by_host[slot.host_id] <= slot.memory_bytes


@given(some_layers, st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 3))
def test_what_fits_in_whole_experts_is_placed(layers: list[MoeLayer], room: list[int], replicas: int) -> None:
    """With experts of one size, refused only where counting says that it can't be done."""
    hosts = [host(f"h{i}", memory=experts * 2000) for i, experts in enumerate(room)]
    units = sum(layer.num_experts for layer in layers)
    possible = sum(min(experts, units) for experts in room) >= replicas * units
    try:
        assert_covers(plan(layers, hosts, settings(replicas), item_bytes=2), layers, replicas)
        placed = True
    except PlacementError:
        placed = False
    assert placed == possible


@given(some_layers, st.lists(st.integers(1, 3), min_size=2, max_size=4), st.integers(2, 3))
def test_copies_are_on_distinct_nodes_where_there_are_enough(
    layers: list[MoeLayer], widths: list[int], replicas: int
) -> None:
    replicas = min(replicas, len(widths))
    hosts = [host(f"h{n}-{i}", node=f"n{n}") for n, width in enumerate(widths) for i in range(width)]
    result = plan(layers, hosts, settings(replicas), item_bytes=2)
    for layer in layers:
        for expert in range(layer.num_experts):
            nodes = [h.node_id for h in hosts if expert in result.assignments[h.host_id].get(layer.index, ())]
            assert len(set(nodes)) == replicas


@given(some_layers, some_hosts)
def test_the_same_input_gives_the_same_plan(layers: list[MoeLayer], hosts: list[HostSlot]) -> None:
    first, second = (plan(layers, hosts, settings(), item_bytes=2) for _ in range(2))
    assert first == second


def test_one_host_holds_everything() -> None:
    result = plan([MoeLayer(0, 8, 10), MoeLayer(1, 4, 10)], [host("a")], settings(), item_bytes=4)
    assert result.assignments == {"a": {0: tuple(range(8)), 1: tuple(range(4))}}
    assert result.bytes_by_host == {"a": 12 * 10 * 4}


def test_shares_follow_the_hosts_speed() -> None:
    layers = [MoeLayer(0, 64, 10)]
    assert counts(plan(layers, [host("a", threads=12), host("b")], settings(), item_bytes=2), 0) == {
        "a": 48,
        "b": 16,
    }
    mixed = counts(
        plan(layers, [host("cpu", threads=16), host("gpu", device="cuda")], settings(), item_bytes=2), 0
    )
    assert mixed["gpu"] > 4 * mixed["cpu"] > 0


def test_a_full_host_leaves_its_share_to_the_others() -> None:
    hosts = [host("small", memory=8 * 20), host("b"), host("c")]
    result = plan([MoeLayer(i, 16, 10) for i in range(4)], hosts, settings(), item_bytes=2)
    assert result.experts_by_host == {"small": 8, "b": 28, "c": 28}
    # ... and of every layer, not all of it of the first ones.
    assert [counts(result, i)["small"] for i in range(4)] == [2, 2, 2, 2]


def test_too_little_memory_says_how_much_in_all_and_where() -> None:
    layers = [MoeLayer(i, 8, GIB // 8) for i in range(4)]  # 8 GiB at 2 bytes
    hosts = [host("big", memory=5 * GIB), host("small", memory=GIB)]
    with pytest.raises(PlacementError) as caught:
        plan(layers, hosts, settings(), item_bytes=2)
    message = caught.value.message
    assert "take 8.00 GiB" in message and "all but 2.00 GiB" in message
    assert "small may hold 1.00 GiB, its share is 4.00 GiB: 3.00 GiB short" in message
    assert "big may hold" not in message
    assert "memory" in caught.value.hint


def test_a_host_counts_for_one_copy_only() -> None:
    """Room for two copies on one host is no room for the second copy."""
    hosts = [host("roomy"), host("small", memory=4 * 20)]
    with pytest.raises(PlacementError, match="2 copies of"):
        plan([MoeLayer(0, 8, 10)], hosts, settings(2), item_bytes=2)


def test_memory_between_two_experts_is_no_room() -> None:
    hosts = [host("a", memory=30), host("b", memory=30)]  # 60 bytes for three experts of 20
    with pytest.raises(PlacementError, match=r"all but 0\.00 MiB"):
        plan([MoeLayer(0, 3, 10)], hosts, settings(), item_bytes=2)


def test_more_copies_than_hosts() -> None:
    with pytest.raises(PlacementError, match="2 copies of each expert need 2 hosts, there are 1"):
        plan([MoeLayer(0, 8, 10)], [host("a")], settings(2), item_bytes=2)


def test_layer_ranges_join_equal_neighbours() -> None:
    hosts = [host("a"), host("b")]
    result = plan([MoeLayer(1, 8, 1), MoeLayer(2, 8, 1), MoeLayer(5, 4, 1)], hosts, settings(), item_bytes=2)
    assert result.layer_ranges("a") == [(1, 2, 4), (5, 5, 2)]


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=8),
    st.integers(0, 200),
)
def test_apportion_hands_out_everything_within_the_caps(rows: list[tuple[int, int]], total: int) -> None:
    weights, caps = [w for w, _ in rows], [c for _, c in rows]
    total = min(total, sum(caps))
    shares = apportion(total, weights, caps)
    assert sum(shares) == total
    assert all(0 <= share <= cap for share, cap in zip(shares, caps, strict=True))


def test_apportion_follows_hamiltons_example() -> None:
    populations: Mapping[str, int] = {"a": 21_878, "b": 9_713, "c": 4_167, "d": 3_252, "e": 1_065}
    # Quotas of 44 seats: 24.02, 10.66, 4.58, 3.57, 1.17; the three left go to b, c... by largest remainder.
    assert apportion(44, list(populations.values()), [44] * 5) == [24, 11, 5, 3, 1]


def test_apportion_refuses_what_the_caps_do_not_admit() -> None:
    with pytest.raises(ValueError, match="admit 3 of 4"):
        apportion(4, [1, 1], [1, 2])


def test_pinned_experts_begin_where_they_may_be_and_the_others_anywhere() -> None:
    layers = [MoeLayer(0, 8, 1000), MoeLayer(1, 8, 1000)]
    hosts = [host("h0", node="a", device="cuda"), host("h1", node="b"), host("h2", node="c")]
    nodes = [NodeInfo(name, "", name, 4, 0, PLENTY, {"zone": name}) for name in "abc"]
    pins = [
        {"experts": [1, 2], "device": "cuda"},
        {"layers": [1], "experts": [5], "selector": {"zone": "in(b, c)"}},
    ]
    result = plan(layers, hosts, settings(pins=pins), item_bytes=2, nodes=nodes)
    assert_covers(result, layers, 1)
    for layer in (0, 1):
        assert {1, 2} <= set(result.assignments["h0"][layer])
    assert 5 not in result.assignments["h0"][1]
    two = plan(layers, hosts, settings(2, pins=pins[1:]), item_bytes=2, nodes=nodes)
    assert_covers(two, layers, 2)
    assert 5 in two.assignments["h1"][1] and 5 in two.assignments["h2"][1]
    with pytest.raises(PlacementError, match=r"pin 0 \(device cuda\) needs 2 node\(s\).* there are 1"):
        plan(layers, hosts, settings(2, pins=pins), item_bytes=2, nodes=nodes)
    with pytest.raises(ConfigError, match=r"placement.pins.0.experts: 9, where layer 0 has 8 experts"):
        plan(layers, hosts, settings(pins=[{"experts": [9], "device": "cpu"}]), item_bytes=2, nodes=nodes)
    with pytest.raises(ConfigError, match=r"placement.pins.0.layers: the model has no layer 7"):
        plan(
            layers,
            hosts,
            settings(pins=[{"layers": [7], "experts": [0], "device": "cpu"}]),
            item_bytes=2,
            nodes=nodes,
        )
