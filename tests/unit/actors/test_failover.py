"""Hosts that die, freeze, lag, refuse and come back, under dispatches over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from actors.dispatch import Dispatcher
from actors.membership import State
from actors.rescue import Outage
from cluster.errors import HostError
from tests.unit.actors.host_mesh import EXPERTS, LAYER, batch

ALL = tuple(range(EXPERTS))
TWICE = [(0, 2, 4, 1), (1, 3, 5, 0), (4, 5, 2, 3)]
"""Every expert on two of three hosts."""


def check(dispatcher: Dispatcher, rows: int = 9) -> float:
    """One dispatch with the right sums; its seconds."""
    x, weights, ids, expected = batch(rows)
    out = torch.full_like(x, 99.0)
    started = time.perf_counter()
    dispatcher(LAYER, x, weights, ids, out)
    took = time.perf_counter() - started
    torch.testing.assert_close(out, expected)
    return took


def until(done: Callable[[], bool], dispatcher: Dispatcher, timeout_s: float = 10.0) -> None:
    """Dispatch on until something holds."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        check(dispatcher)


class Gate:
    """Holds a host up in the middle of its computing while closed, as SIGSTOP would."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __call__(self) -> None:
        assert self._open.wait(20)


@pytest.mark.parametrize("rows", [1, 9, 16, 41])
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_replicas_answer_for_a_host_that_died(make_mesh, transport: str, dead: int, rows: int) -> None:
    mesh = make_mesh(TWICE, "float32", transport)
    dispatcher = mesh.dispatcher()
    check(dispatcher, rows)
    mesh.servers[dead].close()
    for _ in range(5):
        check(dispatcher, rows)
    if rows > 1:  # one row may not have needed the dead one
        assert dispatcher.peers.members.state(f"h{dead}") is State.OUT
        assert dispatcher.stats.ejected == 1
        assert dispatcher.stats.last_reroute_ns >= dispatcher.stats.last_detect_ns > 0


def test_the_one_host_left_gets_all_rows(make_mesh) -> None:
    mesh = make_mesh([ALL, ALL])
    dispatcher = mesh.dispatcher()
    check(dispatcher)
    mesh.servers[0].close()
    check(dispatcher)
    served = mesh.servers[1].rows_served
    check(dispatcher)
    assert mesh.servers[1].rows_served == served + 9


def test_two_of_three_die_one_after_the_other(make_mesh, transport: str) -> None:
    mesh = make_mesh([ALL, ALL, ALL], "float32", transport)
    dispatcher = mesh.dispatcher()
    check(dispatcher)
    for dead in (0, 2):
        mesh.servers[dead].close()
        for _ in range(3):
            check(dispatcher)
    assert dispatcher.peers.members.named(State.ASKED) == ["h1"]


def test_a_host_that_dies_while_it_computes(make_mesh, transport: str) -> None:
    mesh = make_mesh(TWICE, "float32", transport)
    dispatcher = mesh.dispatcher()
    check(dispatcher)
    mesh.experts[1].before = mesh.servers[1].close
    check(dispatcher)
    check(dispatcher)


def test_a_host_that_comes_back_is_asked_again(make_mesh, transport: str) -> None:
    mesh = make_mesh(TWICE, "float32", transport)
    dispatcher = mesh.dispatcher()
    mesh.servers[0].close()
    check(dispatcher)
    assert dispatcher.peers.members.state("h0") is State.OUT
    mesh.restart(0)
    until(lambda: dispatcher.peers.members.state("h0") is State.ASKED, dispatcher)
    served = mesh.servers[0].rows_served
    check(dispatcher)
    assert mesh.servers[0].rows_served > served
    assert dispatcher.stats.let_back == 1
    assert dispatcher.stats.ejected == 0


def test_a_host_comes_back_without_traffic(make_mesh) -> None:
    mesh = make_mesh(TWICE)
    dispatcher = mesh.dispatcher()
    mesh.servers[0].close()
    check(dispatcher)
    assert dispatcher.peers.standing()["h0"]["state"] == "out"
    mesh.restart(0)
    deadline = time.monotonic() + 10
    while dispatcher.peers.standing()["h0"]["state"] != "asked":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert dispatcher.stats.ejected == 0


def test_a_frozen_host_costs_one_deadline_and_comes_back(make_mesh, transport: str) -> None:
    mesh = make_mesh(TWICE, "float32", transport)
    gate = mesh.experts[0].before = Gate()
    dispatcher = mesh.dispatcher()
    for _ in range(20):
        check(dispatcher)
    gate.close()
    try:
        # Generous for a busy machine; the deadline itself is some 10 ms.
        assert check(dispatcher) < 2.0
        assert dispatcher.peers.members.state("h0") is not State.ASKED
        assert dispatcher.stats.hedges == 1
        until(lambda: dispatcher.peers.members.state("h0") is State.OUT, dispatcher)
        assert dispatcher.stats.hedges == 1
    finally:
        gate.open()
    until(lambda: dispatcher.peers.members.state("h0") is State.ASKED, dispatcher)
    check(dispatcher)


def test_a_late_answer_is_dropped_by_its_number(make_mesh, transport: str) -> None:
    """The late host's old sums lie in the memory, or on the stream, where the next answer is expected."""
    mesh = make_mesh(TWICE, "float32", transport)
    gate = mesh.experts[0].before = Gate()
    dispatcher = mesh.dispatcher()
    check(dispatcher, 16)
    gate.close()
    check(dispatcher, 16)
    assert dispatcher.peers.members.state("h0") is State.SUSPECTED
    gate.open()
    until(lambda: dispatcher.peers.members.state("h0") is State.ASKED, dispatcher)
    assert dispatcher.stats.let_back == 0, "it was not even ejected"
    for rows in (1, 16, 5, 9):
        check(dispatcher, rows)


def test_the_first_of_two_answers_is_taken(make_mesh, transport: str) -> None:
    """Both a late host and its replicas are slow: the late one's answer comes first, and is enough."""
    mesh = make_mesh([ALL, ALL], "float32", transport)
    dispatcher = mesh.dispatcher()
    for _ in range(20):
        check(dispatcher)
    other = mesh.experts[1].before = Gate()
    slept = []

    def late_once() -> None:
        if not slept:
            slept.append(True)
            time.sleep(0.2)
            other.close()

    # The replica computes its own share first, and stops at the late one's.
    mesh.experts[0].before = late_once
    try:
        check(dispatcher)
    finally:
        other.open()
    check(dispatcher)


def test_a_slow_host_is_ejected_and_let_back_when_it_is_fast_again(make_mesh) -> None:
    mesh = make_mesh(TWICE)
    dispatcher = mesh.dispatcher()
    for _ in range(20):
        check(dispatcher)
    mesh.experts[2].before = lambda: time.sleep(0.1)
    until(lambda: dispatcher.peers.members.state("h2") is State.OUT, dispatcher)
    assert "late" in dispatcher.peers.members.reason("h2")
    for _ in range(3):
        assert check(dispatcher) < 0.09
    mesh.experts[2].before = lambda: None
    until(lambda: dispatcher.peers.members.state("h2") is State.ASKED, dispatcher)


def test_the_only_holder_is_waited_for(make_mesh, transport: str) -> None:
    """Late or not: nobody else can answer, and it is not ejected for it."""
    mesh = make_mesh([(0, 1, 2), (3, 4, 5)], "float32", transport)
    dispatcher = mesh.dispatcher()
    for _ in range(20):
        check(dispatcher)
    mesh.experts[1].before = lambda: time.sleep(0.15)
    for _ in range(4):
        check(dispatcher)
    assert dispatcher.peers.members.named(State.ASKED) == ["h0", "h1"]
    assert dispatcher.stats.hedges == 0


def test_a_frozen_only_holder_is_given_up_at_the_deadline(make_mesh, transport: str) -> None:
    mesh = make_mesh([(0, 1, 2), (3, 4, 5)], "float32", transport)
    gate = mesh.experts[1].before = Gate()
    dispatcher = mesh.dispatcher(deadline_s=0.3)
    gate.close()
    x, weights, ids, _ = batch(9)
    try:
        started = time.monotonic()
        with pytest.raises(HostError, match="no living host holds expert"):
            dispatcher(LAYER, x, weights, ids, torch.empty_like(x))
        assert time.monotonic() - started < 2.0
    finally:
        gate.open()
    until_back(dispatcher, "h1")
    check(dispatcher)


def until_back(dispatcher: Dispatcher, name: str) -> None:
    deadline = time.monotonic() + 10
    while dispatcher.peers.members.state(name) is not State.ASKED:
        assert time.monotonic() < deadline
        try:
            check(dispatcher)
        except HostError:
            time.sleep(0.02)


def test_without_a_replica_the_rows_are_named_and_the_others_are_right(make_mesh) -> None:
    mesh = make_mesh([(0, 1, 2), (3, 4, 5)])
    outages: list[Outage] = []
    dispatcher = mesh.dispatcher(on_outage=outages.append)
    x, weights, ids, expected = batch(41)
    mesh.servers[1].close()
    out = torch.empty_like(x)
    dispatcher(LAYER, x, weights, ids, out)
    named = {row for outage in outages for row in outage.rows}
    assert named == {row for row in range(41) if (ids[row] >= 3).any()}
    assert all(outage.layer == LAYER and not outage.degraded for outage in outages)
    assert "h1" in outages[0].reason
    for row in range(41):
        if row in named:
            assert not out[row].any()
        else:
            torch.testing.assert_close(out[row], expected[row])


def test_dropped_experts_are_made_up_for_by_the_others(make_mesh) -> None:
    mesh = make_mesh([(0, 1, 2), (3, 4, 5)])
    outages: list[Outage] = []
    dispatcher = mesh.dispatcher(drop=True, on_outage=outages.append)
    x, weights, ids, _ = batch(16)
    mesh.servers[1].close()
    out = torch.empty_like(x)
    dispatcher(LAYER, x, weights, ids, out)
    left = torch.where(ids < 3, weights, 0.0)
    scale = torch.where(left.sum(1) > 0, weights.sum(1) / left.sum(1), 0.0)
    expected = x * (left * (ids + 1)).sum(1, keepdim=True) * scale[:, None]
    torch.testing.assert_close(out, expected)
    assert all(outage.degraded for outage in outages)
    assert {row for outage in outages for row in outage.rows} == {
        row for row in range(16) if (ids[row] >= 3).any()
    }


def test_pairs_without_an_expert_want_nobody_when_a_host_dies(make_mesh, transport: str) -> None:
    """They were taken for pairs of an expert -1, which no living host holds."""
    mesh = make_mesh(TWICE, "float32", transport)
    dispatcher = mesh.dispatcher()
    x, weights, ids, _ = batch(9)
    ids[::2, 0] = -1
    mesh.servers[1].close()
    out = torch.empty_like(x)
    dispatcher(LAYER, x, weights, ids, out)
    torch.testing.assert_close(out, x * torch.where(ids < 0, 0, weights * (ids + 1)).sum(1, keepdim=True))


def test_a_broken_connection_to_the_only_holder_is_made_anew(make_mesh, transport: str) -> None:
    mesh = make_mesh([(0, 1, 2), (3, 4, 5)], "float32", transport)
    dispatcher = mesh.dispatcher()
    check(dispatcher)
    mesh.servers[1].close()
    mesh.restart(1)
    check(dispatcher)


def test_a_refusal_is_answered_by_the_replica_and_costs_no_connection(make_mesh, transport: str) -> None:
    mesh = make_mesh([ALL, ALL], "float32", transport)
    dispatcher = mesh.dispatcher()

    def refuse() -> None:
        raise RuntimeError("out of memory")

    mesh.experts[0].before = refuse
    check(dispatcher)
    assert dispatcher.peers.members.state("h0") is State.ASKED
    mesh.experts[1].before = refuse
    x, weights, ids, _ = batch(9)
    with pytest.raises(HostError, match="out of memory"):
        dispatcher(LAYER, x, weights, ids, torch.empty_like(x))
    mesh.experts[0].before = mesh.experts[1].before = lambda: None
    check(dispatcher)


def test_reachable_does_not_wait_for_a_frozen_host_with_replicas(make_mesh) -> None:
    mesh = make_mesh(TWICE)
    dispatcher = mesh.dispatcher()
    assert set(dispatcher.peers.reachable()) == {"h0", "h1", "h2"}
    mesh.servers[1].close()
    assert set(dispatcher.peers.reachable()) == {"h0", "h2"}
    mesh.servers[2].close()
    with pytest.raises(HostError, match=r"no living host holds expert [35] of layer 3"):
        dispatcher.peers.reachable()


def test_a_new_table_brings_hosts_and_takes_others_away(make_mesh, transport: str) -> None:
    mesh = make_mesh([ALL, ALL, ALL], "float32", transport)
    dispatcher = mesh.dispatcher(route=mesh.route(1, [0, 1]))
    check(dispatcher)
    dispatcher.peers.set_route(mesh.route(2, [1, 2]))
    assert dispatcher.peers.members.named(State.ASKED) == ["h1", "h2"]
    check(dispatcher)
    served = mesh.servers[0].rows_served
    for _ in range(3):
        check(dispatcher)
    assert mesh.servers[0].rows_served == served
    deadline = time.monotonic() + 5
    while mesh.servers[0].connections:
        assert time.monotonic() < deadline


def test_tables_may_change_as_often_as_they_like(make_mesh, transport: str) -> None:
    """Hosts that nobody stands in for move from table to table: no row is lost on the way."""
    mesh = make_mesh([ALL, ALL, ALL], "float32", transport)
    dispatcher = mesh.dispatcher(route=mesh.route(1, [0]))
    for epoch, host in enumerate([1, 0, 2, 1, 2, 0, 1], start=2):
        check(dispatcher)
        dispatcher.peers.set_route(mesh.route(epoch, [host]))
    check(dispatcher)
    assert dispatcher.stats.unanswered_rows == 0


@pytest.mark.parametrize("there", [True, False])
def test_the_only_host_comes_back_though_nobody_asks(make_mesh, there: bool) -> None:
    """A table without any host may lie between; whoever waits for readiness sends no rows."""
    mesh = make_mesh([ALL])
    dispatcher = mesh.dispatcher(route=mesh.route(1, [0]))
    mesh.servers[0].close()
    dispatcher.peers.set_route(mesh.route(2, []))
    with pytest.raises(HostError, match="no living host"):
        dispatcher.peers.reachable()
    if there:
        mesh.restart(0)
    dispatcher.peers.set_route(mesh.route(3, [0]))
    if not there:
        mesh.restart(0)
    deadline = time.monotonic() + 10
    while dispatcher.peers.standing()["h0"]["state"] != "asked":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert set(dispatcher.peers.reachable()) == {"h0"}


def test_a_host_in_a_new_table_that_is_not_there_yet_is_probed(make_mesh) -> None:
    mesh = make_mesh([ALL, ALL])
    dispatcher = mesh.dispatcher(route=mesh.route(1, [0]))
    mesh.servers[1].close()
    dispatcher.peers.set_route(mesh.route(2, [0, 1]))
    check(dispatcher)
    assert dispatcher.peers.members.state("h1") is State.OUT
    mesh.restart(1)
    until(lambda: dispatcher.peers.members.state("h1") is State.ASKED, dispatcher)


def test_random_faults_never_give_a_wrong_sum(make_mesh, transport: str) -> None:
    """Hosts freeze, die and return at random; with one of three always whole, every sum is right."""
    import random

    mesh = make_mesh([ALL, ALL, ALL], "float32", transport)
    gates = [Gate() for _ in ALL[:3]]
    for experts, gate in zip(mesh.experts, gates, strict=True):
        experts.before = gate
    dispatcher = mesh.dispatcher()
    generator = random.Random(7)
    alive = [True, True]
    for _ in range(150):
        victim = generator.randrange(2)
        match generator.choice(["freeze", "thaw", "kill", "start", "none", "none"]):
            case "freeze":
                gates[victim].close()
            case "thaw":
                gates[victim].open()
            case "kill" if alive[victim]:
                mesh.servers[victim].close()
                alive[victim] = False
            case "start" if not alive[victim]:
                mesh.restart(victim)
                alive[victim] = True
        check(dispatcher, generator.choice([1, 3, 9, 16]))
    for gate in gates:
        gate.open()
