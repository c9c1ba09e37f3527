"""The autoscaler's loop over a mesh and a provider in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

import pytest

from cluster.autoscaler import Autoscaler
from cluster.config import HostGroup
from cluster.errors import PlacementError
from cluster.group_loads import Queue, Snapshot
from cluster.messages import HostAddress, HostReport
from cluster.node_shape import NodeShape, in_words, node_shape

GROUPS = (
    HostGroup.model_validate(
        {
            "name": "cpu",
            "count": 2,
            "memory": "8GiB",
            "threads": 4,
            "selector": {"zone": "b"},
            "autoscale": {"min": 1, "max": 6, "utilisation": 0.5, "up_cooldown": 20, "down_cooldown": 60},
        }
    ),
    HostGroup(name="gpu", count=1, device="cuda"),
)


@dataclass
class Mesh:
    """Two groups whose hosts share the work; a scaler that may be short of nodes, and a provider that may fail."""

    counts: dict[str, int] = field(default_factory=lambda: {"cpu": 2, "gpu": 1})
    work: float = 1.0
    """Hosts that it takes to do it."""
    now: float = 0.0
    room: int = 10
    events: list[object] = field(default_factory=list)
    unseen: str = ""
    mute: str = ""
    booting: int = 0
    computed: float = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.computed += seconds * min(1.0, self.work / self.counts["cpu"])

    def snapshot(self) -> Snapshot:
        if self.unseen:
            raise RuntimeError(self.unseen)
        hosts = {f"{group}-{n}": group for group, count in self.counts.items() for n in range(count)}
        ready = dict(list(hosts.items())[self.booting :])
        reports = {
            host_id: HostReport(
                HostAddress(host_id, "n", host_id, "", 1), 4, 1, 1, 0.1, "module", 1, 1, 1, self.computed
            )
            for host_id in ready
        }
        return Snapshot(self.now, dict(self.counts), hosts, reports, queue=Queue(0, 1))

    def scale(self, group: str, count: int) -> None:
        self.events.append((group, count))
        if count > self.room:
            raise PlacementError(f"{self.room} of {count} hosts fit", "add nodes")
        self.counts[group] = count

    def request(self, wanted: Mapping[str, NodeShape]) -> None:
        if self.mute:
            raise ConnectionError(self.mute)
        self.events.append({group: shape.count for group, shape in wanted.items()})
        self.shapes = wanted

    def describe(self) -> str:
        return "one node is starting"


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


@pytest.fixture
def scaler(mesh: Mesh) -> Autoscaler:
    return Autoscaler(GROUPS, mesh.snapshot, mesh, mesh, clock=lambda: mesh.now, period_s=10)


def looks(mesh: Mesh, scaler: Autoscaler, count: int) -> None:
    for _ in range(count):
        mesh.pass_(10)
        scaler.look()


def test_nodes_are_asked_for_first_then_the_group_is_scaled(mesh: Mesh, scaler: Autoscaler) -> None:
    mesh.work = 2.0
    looks(mesh, scaler, 3)
    assert mesh.events == [{}, {}, {"cpu": 4, "gpu": 1}, ("cpu", 4)]
    assert mesh.shapes["cpu"] == NodeShape(4, 4, memory_bytes=8 * 2**30, labels={"zone": "b"})
    (status,) = scaler.statuses()
    assert (status.group, status.target, status.least, status.most) == ("cpu", 4, 1, 6)
    assert "utilisation is 100%, to be 50%, which asks for 4 hosts: 4 instead of 2" in status.reason


def test_a_group_is_scaled_down_host_by_host_and_rests(mesh: Mesh, scaler: Autoscaler) -> None:
    mesh.counts["cpu"], mesh.work = 5, 1.0
    looks(mesh, scaler, 60)
    scaled = [event for event in mesh.events if isinstance(event, tuple)]
    assert scaled == [("cpu", 4), ("cpu", 3), ("cpu", 2)]


def test_between_its_times_it_does_not_look(mesh: Mesh, scaler: Autoscaler) -> None:
    looks(mesh, scaler, 1)
    seen = len(mesh.events)
    for _ in range(9):
        mesh.pass_(1)
        scaler.look()
    assert len(mesh.events) == seen
    mesh.pass_(1)
    scaler.look()
    assert len(mesh.events) == seen + 1


def test_nodes_that_do_not_come_are_asked_for_on_and_the_reason_is_shown(
    mesh: Mesh, scaler: Autoscaler
) -> None:
    mesh.work, mesh.room = 2.0, 2
    looks(mesh, scaler, 4)
    (status,) = scaler.statuses()
    assert status.hosts_wanted == 2
    assert "4 were refused 10 s ago: 2 of 4 hosts fit; one node is starting" in status.reason
    assert mesh.shapes["cpu"].count == 4
    mesh.room = 4
    looks(mesh, scaler, 3)
    assert mesh.counts["cpu"] == 4
    assert "refused" not in scaler.statuses()[0].reason and "node" not in scaler.statuses()[0].reason


def test_nodes_that_come_one_by_one_get_hosts_one_by_one(mesh: Mesh, scaler: Autoscaler) -> None:
    mesh.work, mesh.room = 3.0, 3
    looks(mesh, scaler, 3)
    assert mesh.counts["cpu"] == 3
    assert mesh.events[-2:] == [("cpu", 4), ("cpu", 3)]
    looks(mesh, scaler, 1)
    (status,) = scaler.statuses()
    assert "4 were refused 10 s ago: 3 of 4 hosts fit; one node is starting" in status.reason
    assert mesh.shapes["cpu"].count == 4
    mesh.room = 6
    looks(mesh, scaler, 4)
    assert mesh.counts["cpu"] == 6


def test_what_is_not_wanted_any_more_is_not_asked_for(mesh: Mesh, scaler: Autoscaler) -> None:
    mesh.work, mesh.room = 2.0, 2
    looks(mesh, scaler, 3)
    assert mesh.shapes["cpu"].count == 4
    mesh.work = 1.0
    looks(mesh, scaler, 4)
    assert mesh.events[-1] == {}
    assert scaler.statuses()[0].reason == "utilisation is 50%, to be 50%"


def test_a_refusal_to_go_down_is_shown_and_tried_again_after_another_window(
    mesh: Mesh, scaler: Autoscaler
) -> None:
    mesh.work, mesh.room = 0.1, 0
    looks(mesh, scaler, 9)
    assert "; 1 were refused" in scaler.statuses()[0].reason
    assert [event for event in mesh.events if isinstance(event, tuple)] == [("cpu", 1)]
    looks(mesh, scaler, 6)
    assert [event for event in mesh.events if isinstance(event, tuple)] == [("cpu", 1)] * 2
    mesh.work = 1.0
    looks(mesh, scaler, 1)
    assert "refused" not in scaler.statuses()[0].reason


def test_nodes_of_hosts_that_are_not_ready_are_described(mesh: Mesh, scaler: Autoscaler) -> None:
    mesh.booting = 1
    looks(mesh, scaler, 1)
    assert scaler.statuses()[0].reason == "1 of 2 hosts not ready; one node is starting"
    assert mesh.events == [{"cpu": 2, "gpu": 1}]


def test_a_provider_that_fails_does_not_keep_the_group_from_nodes_that_there_are(
    mesh: Mesh, scaler: Autoscaler
) -> None:
    mesh.work, mesh.mute = 2.0, "no answer"
    looks(mesh, scaler, 3)
    assert mesh.counts["cpu"] == 4
    mesh.room, mesh.work = 4, 4.0
    looks(mesh, scaler, 3)
    assert "; nodes were not asked for: no answer" in scaler.statuses()[0].reason


def test_what_cannot_be_seen_changes_nothing(mesh: Mesh, scaler: Autoscaler) -> None:
    looks(mesh, scaler, 1)
    mesh.work, mesh.unseen = 2.0, "the hosts are away"
    looks(mesh, scaler, 5)
    assert mesh.counts["cpu"] == 2
    assert scaler.statuses()[0].reason == "the load is not known: the hosts are away"
    mesh.unseen = ""
    looks(mesh, scaler, 1)
    assert mesh.counts["cpu"] == 4
    assert "not known" not in scaler.statuses()[0].reason


def test_without_a_provider_the_reason_says_who_brings_nodes(mesh: Mesh) -> None:
    scaler = Autoscaler(GROUPS, mesh.snapshot, mesh, clock=lambda: mesh.now, period_s=10)
    mesh.work, mesh.room = 2.0, 2
    looks(mesh, scaler, 3)
    assert "2 of 4 hosts fit; nobody brings nodes: start them by hand" in scaler.statuses()[0].reason


def test_a_second_look_meanwhile_returns_at_once(mesh: Mesh) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def snapshot() -> Snapshot:
        inside.set()
        assert go_on.wait(30)
        return mesh.snapshot()

    scaler = Autoscaler(GROUPS, snapshot, mesh, mesh, clock=lambda: mesh.now, period_s=10)
    first = threading.Thread(target=scaler.look)
    first.start()
    assert inside.wait(30)
    scaler.look()
    assert mesh.events == []
    go_on.set()
    first.join(30)
    assert mesh.events == [{}]


def test_after_its_end_nothing_is_asked_for(mesh: Mesh, scaler: Autoscaler) -> None:
    mesh.booting = 1
    looks(mesh, scaler, 1)
    scaler.close()
    looks(mesh, scaler, 3)
    assert mesh.events == [{"cpu": 2, "gpu": 1}, {}]


def test_shapes() -> None:
    cpu, gpu = GROUPS
    assert node_shape(cpu, 3) == NodeShape(3, 4, memory_bytes=8 * 2**30, labels={"zone": "b"})
    assert node_shape(gpu, 1) == NodeShape(1, 1, gpus=Decimal(1))
    part = node_shape(HostGroup.model_validate({"device": "cuda", "gpus": "0.40"}), 2)
    assert part == NodeShape(2, 1, gpus=Decimal("0.4")) and in_words(part) == "2 × (1 CPU + 0.4 GPU)"
    assert node_shape(HostGroup(), 2) == NodeShape(2, 1)
