"""Which node a host goes to whose own is gone."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from cluster.messages import HostSpec, NodeInfo
from cluster.rehome import Limits, Resident, moved, new_home


def node(node_id: str, memory: int = 1000, cpus: float = 4, gpus: float = 0, **labels: str) -> NodeInfo:
    return NodeInfo(node_id, f"ip-{node_id}", node_id, cpus, gpus, memory, labels)


def host(
    host_id: str, node_id: str, *experts: int, weight: int = 80, device: str = "cpu", gpus: str = "1"
) -> Resident:
    spec = HostSpec(
        host_id, node_id, "/m", "m", "m", "float32", device, "auto", 8, {3: experts}, host_id, "", 0
    )
    if device == "cuda":
        spec = replace(spec, gpus=Decimal(gpus))
    return Resident(spec, node_id, weight)


LOST = host("lost", "gone", 1, 2)


def home(*nodes: NodeInfo, others: tuple[Resident, ...] = (), limits: Limits | None = None) -> str | None:
    chosen = new_home(LOST, others, nodes, limits or Limits())
    return chosen and chosen.node_id


def test_the_node_with_most_memory_left_that_has_no_copy() -> None:
    assert home(node("a"), node("b", 2000)) == "b"
    assert home(node("a"), node("b", 2000), others=(host("x", "b", 2, 7),)) == "a"
    assert home(node("a"), node("b", 2000), others=(host("x", "b", 7),)) == "b"
    # Better beside a copy than not at all.
    assert home(node("a", 99), node("b", 2000), others=(host("x", "b", 2),)) == "b"
    assert home(node("b"), node("a")) == "a"


@pytest.mark.parametrize(("memory", "fits"), [(200, True), (199, False)])
def test_memory_is_what_is_left_by_hosts_and_engines(memory: int, fits: bool) -> None:
    others = (host("x", "a", 5), host("gpu", "a", 5, weight=10**6, device="cuda"), host("y", "b", 5))
    assert (home(node("a", memory), others=others) == "a") is fits
    assert (home(node("a", memory), limits=Limits(reserved_bytes={"a": 100})) == "a") is fits


def test_a_node_without_cpus_takes_nothing() -> None:
    assert home(node("head", cpus=0)) is None
    assert home() is None


def test_the_selector_of_its_group_is_kept_to() -> None:
    limits = Limits(selectors={"lost": {"zone": "!a"}})
    assert home(node("x", 5000, zone="a"), node("y", zone="b"), limits=limits) == "y"
    assert home(node("x", 5000, zone="a"), limits=limits) is None


def test_a_gpu_host_needs_a_gpu_that_is_free() -> None:
    lost = host("lost", "gone", 1, device="cuda", weight=10**9)
    taken = (host("x", "a", 5, device="cuda"),)
    assert new_home(lost, taken, [node("a", gpus=1)], Limits()) is None
    assert new_home(lost, taken, [node("a", gpus=2)], Limits()) is not None
    assert new_home(lost, taken, [node("a", gpus=2)], Limits(reserved_gpus={"a": (Decimal(1),)})) is None


def test_a_share_of_a_gpu_is_of_one_gpu_and_of_the_engines_if_there_is_room() -> None:
    lost = host("lost", "gone", 1, device="cuda", gpus="0.3")
    engine = Limits(reserved_gpus={"b": (Decimal("0.5"),)})

    def at(*others: Resident, limits: Limits = engine) -> str | None:
        chosen = new_home(lost, others, [node("a", 9000, gpus=2), node("b", gpus=1)], limits)
        return chosen and chosen.node_id

    assert at(limits=Limits()) == "a"
    assert at() == "b"
    # Apart from the other copies counts for more.
    assert at(host("x", "b", 1, device="cuda", gpus="0.1")) == "a"
    beside = host("x", "b", 5, device="cuda", gpus="0.3")
    assert at(beside) == "a"
    taken = [host(f"y{i}", "a", 5, device="cuda", gpus="0.8") for i in range(2)]
    assert at(beside, *taken) is None


def test_elsewhere_a_host_is_reached_by_tcp_and_has_the_threads_that_are_there() -> None:
    assert moved(LOST.spec, node("gone")) is LOST.spec
    there = moved(LOST.spec, node("b", cpus=2))
    assert there == replace(LOST.spec, node_id="b", tcp_ip="ip-b", threads=2)
