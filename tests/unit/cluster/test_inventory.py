from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import HostGroup
from cluster.errors import PlacementError
from cluster.gpu_shares import turns
from cluster.inventory import join, matches, nodes_from_ray, slots
from cluster.messages import NodeInfo

GIB = 2**30


def node(
    name: str, *, cpus: float = 8, gpus: float = 0, memory: int = 100, labels: Mapping[str, str] | None = None
) -> NodeInfo:
    return NodeInfo(name, "10.0.0.1", f"host-of-{name}", cpus, gpus, memory * GIB, labels or {})


def group(**values: Any) -> HostGroup:
    return HostGroup.model_validate(values)


def test_nodes_from_ray() -> None:
    alive = {
        "NodeID": "b",
        "Alive": True,
        "NodeManagerAddress": "10.0.0.2",
        "NodeManagerHostname": "big",
        "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 1e9, "node:10.0.0.2": 1.0},
        "Labels": {"zone": "b"},
    }
    bare = {"NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {}}
    dead = {"NodeID": "c", "Alive": False, "Resources": {"CPU": 64.0}}
    assert nodes_from_ray([alive, bare, dead]) == (
        NodeInfo("a", "10.0.0.1", "", 0, 0, 0),
        NodeInfo("b", "10.0.0.2", "big", 4, 1, 10**9, {"zone": "b"}),
    )


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"zone": "b"}, True),
        ({"zone": "a"}, False),
        ({"zone": "!a"}, True),
        ({"zone": "!b"}, False),
        ({"zone": "in(a, b)"}, True),
        ({"zone": "in(a,c)"}, False),
        ({"zone": "!in(a, c)"}, True),
        ({"zone": "!in(a, b)"}, False),
        ({"rack": "1"}, False),
        ({"rack": "!1"}, True),
        ({"zone": "b", "disk": "ssd"}, True),
        ({"zone": "b", "disk": "tape"}, False),
    ],
)
def test_selectors(selector: dict[str, str], expected: bool) -> None:
    assert matches(selector, {"zone": "b", "disk": "ssd"}) is expected


def test_one_host_on_a_laptop_gets_every_core_and_most_of_the_memory() -> None:
    (slot,) = slots([HostGroup()], [node("n", cpus=8, memory=10)])
    assert (slot.host_id, slot.group, slot.device, slot.node_id, slot.threads) == (
        "local-0",
        "local",
        "cpu",
        "n",
        8,
    )
    assert slot.memory_bytes == 8 * GIB


def test_what_engines_take_is_never_less_than_nothing_left() -> None:
    with pytest.raises(PlacementError, match=r"memory left: host-of-n 0\.0 GiB"):
        slots([HostGroup()], [node("n", memory=10)], reserved_memory={"n": 11 * GIB})


def test_hosts_of_one_node_share_it() -> None:
    found = slots([group(count=3)], [node("n", cpus=8, memory=30)])
    assert [slot.host_id for slot in found] == ["local-0", "local-1", "local-2"]
    assert {(slot.threads, slot.memory_bytes) for slot in found} == {(2, 8 * GIB)}
    assert {slot.threads for slot in slots([group(count=5)], [node("n", cpus=2)])} == {1}


def test_hosts_go_round_the_nodes_with_the_largest_first() -> None:
    nodes = [node("small", memory=10), node("big", memory=30), node("mid", memory=20)]
    found = slots([group(count=4)], nodes)
    assert [slot.node_id for slot in found] == ["big", "mid", "small", "big"]


def test_a_second_group_goes_where_more_is_left() -> None:
    found = slots([group(name="a"), group(name="b")], [node("n1"), node("n2")])
    assert {slot.node_id for slot in found} == {"n1", "n2"}


def test_what_the_engine_takes_is_not_shared_out() -> None:
    (slot,) = slots([HostGroup()], [node("n", memory=10)], reserved_memory={"n": 5 * GIB})
    assert slot.memory_bytes == 4 * GIB


def test_explicit_limits_come_off_before_the_rest_is_shared() -> None:
    found = slots(
        [group(name="a", count=2), group(name="b", memory="20GiB", threads=3)], [node("n", memory=40)]
    )
    assert {slot.group: (slot.memory_bytes, slot.threads) for slot in found} == {
        "a": (8 * GIB, 2),
        "b": (20 * GIB, 3),
    }


def test_explicit_limits_must_fit_the_nodes() -> None:
    nodes = [node("n1", memory=10), node("n2", memory=7)]
    found = slots([group(count=3, memory="4GiB")], nodes)
    assert Counter(slot.node_id for slot in found) == {"n1": 2, "n2": 1}
    with pytest.raises(
        PlacementError, match=r"3 of 4 hosts fit; memory left: host-of-n1 2\.0 GiB, host-of-n2 3"
    ):
        slots([group(count=4, memory="4GiB")], nodes)


def test_the_selector_chooses_the_nodes() -> None:
    nodes = [node("a", labels={"zone": "a"}, memory=500), node("b", labels={"zone": "b"})]
    assert [slot.node_id for slot in slots([group(count=2, selector={"zone": "b"})], nodes)] == ["b", "b"]


def test_no_node_matches() -> None:
    nodes = [
        node("a", labels={"zone": "a", "ray.io/node-id": "a"}),
        node("b", labels={"zone": "b", "disk": "ssd"}),
    ]
    with pytest.raises(PlacementError) as caught:
        slots([group(name="far", selector={"zone": "c", "disk": "ssd"})], nodes)
    assert "group far: no node matches the selector zone: c, disk: ssd" in caught.value.message
    assert "labels that exist on 2 nodes: disk: ssd, zone: a, zone: b;" in caught.value.hint


def test_gpu_hosts_take_one_gpu_each_and_leave_the_engines() -> None:
    nodes = [
        node("a", gpus=2, labels={"ray.io/accelerator-type": "H100"}),
        node("b", gpus=1, labels={"ray.io/accelerator-type": "L4"}),
        node("c", memory=900),
    ]
    found = slots([group(count=2, device="cuda")], nodes, reserved_gpus={"a": (Decimal(1),)})
    assert [(slot.node_id, slot.device, slot.memory_bytes) for slot in found] == [
        ("a", "cuda", 64 * GIB),
        ("b", "cuda", int(24 * GIB * 0.8)),
    ]
    with pytest.raises(
        PlacementError, match="group local: 2 of 3 hosts get a GPU each: host-of-a has 2 GPUs, of"
    ):
        slots([group(count=3, device="cuda")], nodes, reserved_gpus={"a": (Decimal(1),)})


H100 = {"ray.io/accelerator-type": "H100"}


def test_hosts_share_a_gpu_with_the_engine_before_they_take_another() -> None:
    nodes = [node("a", gpus=1, labels=H100), node("b", gpus=1, labels=H100, memory=900)]
    some = group(name="gpu", count=3, device="cuda", gpus=0.3)
    found = slots([some], nodes, reserved_gpus={"a": (Decimal("0.4"),)})
    assert [slot.node_id for slot in found] == ["a", "a", "b"]
    assert {(slot.gpus, slot.memory_bytes) for slot in found} == {(Decimal("0.3"), int(80 * GIB * 0.8 * 0.3))}
    placed = [(some, "a"), (some, "b")]
    late = join(some, "gpu-9", placed, nodes, reserved_gpus={"a": (Decimal("0.4"),)})
    assert late.node_id == "a"
    late = join(some, "gpu-9", [*placed, (some, "a")], nodes, reserved_gpus={"a": (Decimal("0.4"),)})
    assert late.node_id == "b"
    explicit = group(device="cuda", gpus=0.3, memory="70GiB")
    assert slots([explicit], nodes)[0].memory_bytes == 70 * GIB


def test_two_free_halves_are_no_gpu() -> None:
    nodes = [node("a", gpus=2, labels=H100)]
    halves = group(name="half", count=3, device="cuda", gpus=0.5)
    assert len(slots([halves], nodes)) == 3
    with pytest.raises(PlacementError) as no:
        slots([halves, group(name="whole", device="cuda")], nodes)
    assert no.value.message == (
        "host group whole: 0 of 1 hosts get a GPU each: host-of-a has 2 GPUs, of which hosts take 0.5 + 0.5 + 0.5"
    )
    with pytest.raises(PlacementError, match=r"half: 4 of 5 hosts get 0\.5 of a GPU each") as no:
        slots([halves.model_copy(update={"count": 5})], nodes)
    for way_out in (
        "lower the group's gpus or count",
        "engine.gpus",
        "add GPU nodes; on a node of several GPUs Ray chooses",
    ):
        assert way_out in no.value.hint
    with pytest.raises(PlacementError, match="group local: 1 of 2 hosts get"):
        join(
            group(device="cuda", gpus=0.6),
            "local-1",
            [(group(device="cuda", gpus=0.6), "a")],
            [node("a", gpus=1)],
        )


def test_a_gpu_of_unknown_size_needs_a_limit() -> None:
    nodes = [node("a", gpus=1)]
    assert slots([group(device="cuda", memory="20GiB")], nodes)[0].memory_bytes == 20 * GIB
    with pytest.raises(PlacementError, match="memory of the GPUs on host-of-a is not known"):
        slots([group(device="cuda")], nodes)


def test_nodes_that_are_too_small_are_named() -> None:
    with pytest.raises(PlacementError, match="none of the 1 matching nodes has a GPU"):
        slots([group(device="cuda")], [node("a")])
    with pytest.raises(PlacementError, match="has 16 CPUs") as caught:
        slots([group(threads=16)], [node("a", cpus=8)])
    assert "host-of-a: 8 CPUs, 0 GPUs" in caught.value.hint
    # A head node that was started with no CPUs is not for work.
    assert [slot.node_id for slot in slots([group(count=2)], [node("head", cpus=0), node("a")])] == ["a", "a"]


some_nodes = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 4), st.integers(1, 500)), min_size=1, max_size=5
).map(lambda rows: [node(f"n{i}", cpus=c, gpus=g, memory=m) for i, (c, g, m) in enumerate(rows)])
some_groups = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.sampled_from([("cpu", 1), ("cuda", 1), ("cuda", 0.5), ("cuda", 0.3), ("cuda", 0.1)]),
        st.sampled_from(["auto", "1GiB", "40GiB"]),
    ).filter(lambda row: row[1][0] == "cpu" or row[2] != "auto"),
    min_size=1,
    max_size=3,
).map(
    lambda rows: [
        group(name=f"g{i}", count=c, device=d, gpus=s, memory=m) for i, (c, (d, s), m) in enumerate(rows)
    ]
)


@given(some_groups, some_nodes)
def test_nodes_are_never_overdrawn(groups: list[HostGroup], nodes: list[NodeInfo]) -> None:
    try:
        found = slots(groups, nodes)
    except PlacementError:
        return
    assert Counter(slot.group for slot in found) == {g.name: g.count for g in groups}
    assert len({slot.host_id for slot in found}) == len(found)
    for one in nodes:
        here = [slot for slot in found if slot.node_id == one.node_id]
        assert sum(slot.memory_bytes for slot in here if slot.device == "cpu") <= one.memory_bytes
        on_gpus = [slot.gpus for slot in here if slot.device == "cuda"]
        assert len(set(turns(int(one.gpus), on_gpus))) <= one.gpus
        assert all(1 <= slot.threads <= one.cpus for slot in here)
