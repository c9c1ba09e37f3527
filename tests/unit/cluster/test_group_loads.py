from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.group_loads import Queue, Snapshot, group_loads
from cluster.messages import HostAddress, HostReport
from cluster.router_queues import RouterQueues


def report(pid: int, compute_seconds: float, weight_bytes: int = 0) -> HostReport:
    address = HostAddress("any", "node", "unix", "", pid)
    return HostReport(address, 4, weight_bytes, 2048, 0.1, "module", 1, 10, 10, compute_seconds)


BEFORE = Snapshot(
    at=100.0,
    wanted={"cpu": 2, "gpu": 1},
    groups={"cpu-0": "cpu", "cpu-1": "cpu", "gpu-0": "gpu"},
    reports={"cpu-0": report(1, 5.0), "cpu-1": report(2, 1.0), "gpu-0": report(3, 0.0)},
)
LATER = replace(
    BEFORE,
    at=110.0,
    reports={"cpu-0": report(1, 13.0, 60), "cpu-1": report(2, 3.0, 30), "gpu-0": report(3, 1.0, 500)},
    allowed_bytes={"cpu-0": 100, "cpu-1": 80, "gpu-0": 1000},
    queue=Queue(waiting=3, running=2),
)


def test_utilisation_is_the_mean_of_the_hosts_shares() -> None:
    loads = group_loads(BEFORE, LATER)
    assert set(loads) == {"cpu", "gpu"}
    assert loads["cpu"].utilisation == pytest.approx((0.8 + 0.2) / 2)
    assert loads["gpu"].utilisation == pytest.approx(0.1)


def test_memory_is_what_the_group_holds_of_what_it_may_and_the_queue_is_everybody_s() -> None:
    loads = group_loads(BEFORE, LATER)
    assert loads["cpu"].memory_share == pytest.approx(90 / 180)
    assert loads["gpu"].memory_share == pytest.approx(0.5)
    assert {(load.waiting, load.running) for load in loads.values()} == {(3, 2)}


def test_what_was_not_seen_is_not_known() -> None:
    unseen = replace(LATER, allowed_bytes={}, queue=None)
    for before in (None, LATER):
        load = group_loads(before, unseen)["cpu"]
        assert (load.utilisation, load.memory_share, load.waiting, load.running) == (None,) * 4
        assert (load.hosts_ready, load.hosts_wanted) == (2, 2)


def test_a_process_that_was_started_meanwhile_has_counted_from_zero() -> None:
    after = replace(LATER, reports={**LATER.reports, "cpu-1": report(9, 0.5)})
    assert group_loads(BEFORE, after)["cpu"].utilisation == pytest.approx((0.8 + 0.05) / 2)


def test_a_host_that_was_not_ready_before_or_is_not_now_does_not_count() -> None:
    joined = replace(LATER, groups={**LATER.groups, "cpu-2": "cpu"}, wanted={"cpu": 3, "gpu": 1})
    joined = replace(
        joined, reports={**LATER.reports, "cpu-1": "does not answer", "cpu-2": report(4, 9.0, 10)}
    )
    load = group_loads(BEFORE, joined)["cpu"]
    assert load.utilisation == pytest.approx(0.8)
    assert (load.hosts_ready, load.hosts_wanted) == (2, 3)
    assert load.memory_share == pytest.approx(60 / 100)
    nobody = replace(LATER, reports={"gpu-0": report(3, 1.0)})
    assert group_loads(BEFORE, nobody)["cpu"].utilisation is None


def test_a_host_that_is_drained_is_ready_and_not_wanted() -> None:
    load = group_loads(BEFORE, replace(LATER, wanted={"cpu": 1, "gpu": 1}))["cpu"]
    assert (load.hosts_ready, load.hosts_wanted) == (2, 1)


def test_no_host_computes_more_than_all_the_time() -> None:
    # A report takes its time to come, so a little more may have been counted than went by.
    after = replace(LATER, reports={"cpu-0": report(1, 15.2), "cpu-1": report(2, 11.1)})
    assert group_loads(BEFORE, after)["cpu"].utilisation == 1.0


def test_routers_queues_are_added_up_while_they_are_fresh() -> None:
    now = 0.0
    queues = RouterQueues(lambda: now, fresh_s=10)
    assert queues.total() is None
    queues.tell("one", Queue(5, 2))
    now = 6.0
    queues.tell("two", Queue(1, 1))
    assert queues.total() == Queue(6, 3)
    queues.tell("one", Queue(0, 3))
    assert queues.total() == Queue(1, 4)
    now = 16.0
    queues.tell("one", Queue(0, 2))
    assert queues.total() == Queue(1, 3)
    now = 16.5
    assert queues.total() == Queue(0, 2)
