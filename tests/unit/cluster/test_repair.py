"""Every rule of the repair by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from cluster import repair
from cluster.messages import HostAddress, HostSpec, NodeInfo
from cluster.repair_state import (
    Action,
    Backoff,
    End,
    HostDead,
    HostFailed,
    HostReady,
    Launch,
    NodesSeen,
    Observation,
    Phase,
    Publish,
    Repair,
    Tick,
    Wanted,
    planned,
    rebased,
    statuses,
)

NODES = tuple(NodeInfo(f"n{i}", f"10.0.0.{i}", f"n{i}", 4, 0, 1000) for i in range(3))
BACKOFF = Backoff(first_s=1, longest_s=10, quiet_s=60)


def spec(host_id: str, node_id: str) -> HostSpec:
    return HostSpec(
        host_id, node_id, "/m", "m", "m", "float32", "cpu", "auto", 1, {0: (0,)}, host_id, "10.0.0.9", 0
    )


def address(host_id: str, generation: int) -> HostAddress:
    return HostAddress(host_id, "n", host_id, "", 10 * generation)


class Mesh:
    """Two hosts on two nodes; keeps the state and the time."""

    def __init__(self) -> None:
        self.wanted = Wanted({"a": spec("a", "n0"), "b": spec("b", "n1")}, backoff=BACKOFF)
        self.state = planned(self.wanted.specs, 3)
        self.now = 100.0

    def see(self, seen: Observation, after_s: float = 0.0) -> tuple[Action, ...]:
        self.now += after_s
        self.state, actions = repair.step(self.wanted, self.state, seen, self.now)
        return actions

    def nodes(self, *living: NodeInfo, after_s: float = 0.1) -> tuple[Action, ...]:
        self.now += after_s
        return self.see(NodesSeen(self.now, living))

    def ready(self, host_id: str, weight_bytes: int = 80) -> tuple[Action, ...]:
        generation = self.state.hosts[host_id].generation
        return self.see(HostReady(host_id, generation, address(host_id, generation), weight_bytes))

    def dead(self, host_id: str, after_s: float = 0.0) -> tuple[Action, ...]:
        return self.see(HostDead(host_id, self.state.hosts[host_id].generation, "killed"), after_s)


@pytest.fixture
def launched() -> Mesh:
    mesh = Mesh()
    for host_id in mesh.wanted.specs:
        mesh.state, launch = repair.launch(mesh.wanted, mesh.state, host_id, mesh.now)
        assert launch == Launch(mesh.wanted.specs[host_id], 1)
    mesh.nodes(*NODES)
    return mesh


@pytest.fixture
def mesh(launched: Mesh) -> Mesh:
    launched.ready("a")
    launched.ready("b")
    return launched


def test_the_first_table_comes_when_all_are_ready(launched: Mesh) -> None:
    assert launched.ready("a") == ()
    assert launched.state.table == {"a": None, "b": None}
    assert launched.ready("b") == (Publish(4, {"a": address("a", 1), "b": address("b", 1)}),)
    assert launched.ready("b") == ()


def test_before_that_nothing_is_repaired(launched: Mesh) -> None:
    launched.ready("a")
    assert launched.dead("a") == launched.nodes(NODES[0]) == launched.see(Tick(), 100) == ()
    assert launched.see(HostFailed("b", 1, "broken")) == launched.see(Tick(), 1) == ()
    # Before it failed, its node was gone.
    assert [host.phase for host in launched.state.hosts.values()] == [Phase.DOWN, Phase.DOWN]


def test_a_dead_host_leaves_the_table_and_is_launched_again_at_once(mesh: Mesh) -> None:
    without = {"a": None, "b": address("b", 1)}
    assert mesh.dead("a") == (Publish(5, without), Launch(mesh.wanted.specs["a"], 2))
    assert mesh.state.hosts["a"].reason == "killed"
    assert mesh.ready("a") == (Publish(6, {**without, "a": address("a", 2)}),)


def test_what_an_older_launch_says_is_ignored_whatever_it_is(mesh: Mesh) -> None:
    mesh.dead("a")
    before = mesh.state
    for late in (HostReady("a", 1, address("a", 1), 80), HostFailed("a", 1, "old"), HostDead("a", 1, "old")):
        assert mesh.see(late) == ()
    assert mesh.see(HostReady("a", 3, address("a", 3), 80)) == mesh.see(HostDead("x", 1, "?")) == ()
    assert mesh.state is before


def test_a_launch_that_died_does_not_become_ready_by_a_late_message(mesh: Mesh) -> None:
    mesh.dead("a")
    mesh.dead("a")
    assert mesh.state.hosts["a"].phase is Phase.BACKING_OFF
    assert mesh.see(HostReady("a", 2, address("a", 2), 80)) == ()
    assert mesh.state.table["a"] is None


def test_a_death_that_is_told_twice_is_one_crash(mesh: Mesh) -> None:
    mesh.dead("a")
    mesh.dead("a")
    before = mesh.state
    assert mesh.dead("a", after_s=0.5) == ()
    assert mesh.state is before and mesh.state.hosts["a"].crashes == 2


def test_pauses_double_up_to_the_longest(mesh: Mesh) -> None:
    mesh.dead("a")
    for crashes, pause in enumerate((1, 2, 4, 8, 10, 10), 2):
        assert mesh.dead("a") == ()
        (status, _) = statuses(mesh.state, mesh.now)
        assert (status.state, status.crashes, status.reason) == ("backing off", crashes, "killed")
        assert status.next_try_s == pause
        assert mesh.see(Tick(), pause - 0.01) == ()
        assert mesh.see(Tick(), 0.01) == (Launch(mesh.wanted.specs["a"], crashes + 1),)


def test_crashes_are_forgotten_after_a_quiet_time(mesh: Mesh) -> None:
    mesh.dead("a")
    mesh.dead("a")
    mesh.see(Tick(), 1)
    mesh.ready("a")
    mesh.see(Tick(), 59)
    # That it is ready is told all the time.
    assert mesh.ready("a") == ()
    assert mesh.state.hosts["a"].crashes == 2
    mesh.see(Tick(), 1)
    assert (mesh.state.hosts["a"].crashes, mesh.state.hosts["a"].reason) == (0, "")


def test_a_quiet_time_counts_though_nobody_looked_meanwhile(mesh: Mesh) -> None:
    mesh.dead("a")
    mesh.ready("a")
    (publish,) = mesh.dead("a", after_s=59)
    assert isinstance(publish, Publish) and publish.hosts["a"] is None
    assert (mesh.state.hosts["a"].phase, mesh.state.hosts["a"].crashes) == (Phase.BACKING_OFF, 2)
    mesh.see(Tick(), 1)
    mesh.ready("a")
    mesh.dead("a", after_s=60)
    assert (mesh.state.hosts["a"].phase, mesh.state.hosts["a"].crashes) == (Phase.STARTING, 1)


def test_starting_for_long_is_not_quiet(mesh: Mesh) -> None:
    mesh.dead("a")
    mesh.see(Tick(), 100)
    mesh.dead("a")
    assert mesh.state.hosts["a"].crashes == 2


def test_one_that_cannot_load_is_ended_before_it_is_launched_again(mesh: Mesh) -> None:
    mesh.dead("a")
    assert mesh.see(HostFailed("a", 2, "broken")) == (End("a", 2),)
    assert mesh.see(HostFailed("a", 2, "broken")) == ()
    assert mesh.see(Tick(), 1) == (End("a", 2),)
    assert mesh.dead("a") == ()
    host = mesh.state.hosts["a"]
    assert (host.phase, host.crashes, host.reason) == (Phase.BACKING_OFF, 2, "broken")


def test_a_host_of_a_gone_node_goes_to_another_by_tcp_and_it_is_no_crash(mesh: Mesh) -> None:
    moved = replace(mesh.wanted.specs["a"], node_id="n2", tcp_ip="10.0.0.2")
    assert mesh.nodes(*NODES[1:]) == (
        Publish(5, {"a": None, "b": address("b", 1)}),
        Launch(moved, 2),
    )
    host = mesh.state.hosts["a"]
    assert (host.node_id, host.crashes, host.reason) == ("n2", 0, "node n0 is gone")
    # It stays where it is when its first node is back.
    assert mesh.nodes(*NODES) == ()
    assert mesh.dead("a") == (Launch(moved, 3),)


def test_a_host_waits_for_room_and_says_so(mesh: Mesh) -> None:
    full = replace(NODES[1], memory_bytes=199)
    assert mesh.nodes(full) == (Publish(5, {"a": None, "b": address("b", 1)}),)
    (status, _) = statuses(mesh.state, mesh.now)
    assert (status.state, status.next_try_s) == ("waiting for room", None)
    assert "node n0 is gone" in status.reason and "0.1 KiB" in status.reason
    assert mesh.see(Tick(), 1) == mesh.nodes(full) == ()
    (launch,) = mesh.nodes(full, NODES[2])
    assert isinstance(launch, Launch) and launch.spec.node_id == "n2"


def test_a_host_waits_for_its_own_node_too(mesh: Mesh) -> None:
    full = replace(NODES[1], memory_bytes=199)
    mesh.nodes(full)
    assert mesh.nodes(full, NODES[0]) == (Launch(mesh.wanted.specs["a"], 2),)


def test_the_largest_moves_first(mesh: Mesh) -> None:
    mesh.dead("b")
    mesh.ready("b", weight_bytes=160)
    actions = mesh.nodes(replace(NODES[2], memory_bytes=250))
    assert [action.spec.host_id for action in actions if isinstance(action, Launch)] == ["b"]
    assert mesh.state.hosts["a"].phase is Phase.NO_ROOM


def test_nodes_seen_earlier_or_none_at_all_change_nothing(mesh: Mesh) -> None:
    before = mesh.state
    assert mesh.see(NodesSeen(mesh.now, ())) == ()
    assert mesh.see(NodesSeen(mesh.now - 1, NODES[1:])) == ()
    assert mesh.state is before


def test_nodes_seen_before_a_launch_say_nothing_about_it(mesh: Mesh) -> None:
    seen_at = mesh.now + 1
    mesh.dead("a", after_s=2)
    assert mesh.see(NodesSeen(seen_at, NODES[1:])) == ()
    assert mesh.state.hosts["a"].phase is Phase.STARTING


def test_a_saved_state_goes_on_by_another_clock_and_waits_for_nodes(mesh: Mesh) -> None:
    mesh.dead("a")
    mesh.dead("a")
    adapter = TypeAdapter(Repair)
    text = adapter.dump_json(replace(mesh.state, nodes=None))
    mesh.state = rebased(adapter.validate_json(text), -90.0)
    mesh.now -= 90
    (status, _) = statuses(mesh.state, mesh.now)
    assert (status.next_try_s, status.crashes, mesh.state.epoch) == (1, 2, 5)
    assert mesh.see(Tick(), 5) == ()
    assert mesh.nodes(*NODES) == (Launch(mesh.wanted.specs["a"], 3),)
