"""The dispatch measurement: turns, ratios and bars, and the processes that it starts."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest

from cluster.errors import HostError
from tests.unit.workloads.child_jobs import end_at_once, serve_nothing
from workloads.bench.children import child
from workloads.bench.dispatch import alternate, bars, result
from workloads.bench.dispatch_mesh import EXPERTS, HostJob, jobs_of_process
from workloads.bench.report import Quantiles


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_path_has_its_block_in_every_round() -> None:
    calls: list[str] = []
    names = ("floor", "dispatch_1", "ray_actor")
    paths: dict[str, Callable[[], object]] = {name: partial(calls.append, name) for name in names}
    times = alternate(paths, rounds=30, block=8, order=random.Random(1))
    assert {name: len(values) for name, values in times.items()} == {
        "floor": 240,
        "dispatch_1": 240,
        "ray_actor": 150,  # Ray's calls take milliseconds: shorter blocks
    }
    firsts: Counter[str] = Counter()
    for start in range(0, len(calls), 21):
        turn = calls[start : start + 21]
        assert Counter(turn) == {"floor": 8, "dispatch_1": 8, "ray_actor": 5}
        assert sum(a != b for a, b in pairwise(turn)) == 2
        firsts[turn[0]] += 1
    assert set(firsts) == set(names)


def quantiles_of(p50: float) -> Quantiles:
    return Quantiles(10, p50, 2 * p50, 3 * p50)


def test_ratios_and_bars() -> None:
    found = {
        "dispatch_1": quantiles_of(30.0),
        "floor": quantiles_of(20.0),
        "socket": quantiles_of(25.0),
        "zeromq": quantiles_of(60.0),
        "ray_actor": quantiles_of(450.0),
    }
    line = result(8, 2048, 1, found)
    assert (line["p50_us"], line["p99_us"], line["floor_p50_us"]) == (30.0, 90.0, 20.0)
    assert (line["floor_ratio"], line["ray_actor_ratio"]) == (1.5, 15.0)
    assert (line["socket_p99_us"], line["ray_graph_p50_us"]) == (75.0, None)
    met = {bar.key: bar.met for bar in bars([line, {**line, "hosts": 2, "floor_ratio": 9.0}])}
    assert met == {"floor_ratio_8x2048": True, "ray_actor_ratio_8x2048": False}


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_experts_are_shared_out_evenly(hosts: int) -> None:
    jobs = [HostJob("run", position, hosts, 8) for position in range(hosts)]
    assert sorted(expert for job in jobs for expert in job.owned) == list(range(EXPERTS))
    assert len({len(job.owned) for job in jobs}) == 1


def test_a_process_serves_every_mesh_that_has_its_position() -> None:
    jobs = jobs_of_process("run", 1, (1, 2, 4), (512, 2048))
    assert [(job.hosts, job.hidden) for job in jobs] == [(2, 512), (2, 2048), (4, 512), (4, 2048)]


def test_a_child_ends_with_its_block_even_on_interruption() -> None:
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt), child(serve_nothing) as pid:
        pids.append(pid)
        assert alive(pid)
        raise KeyboardInterrupt
    deadline = time.monotonic() + 5
    while alive(pids[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pids[0])


def test_a_child_that_never_is_ready_is_one_clear_error() -> None:
    with pytest.raises(HostError, match="end_at_once ended before it was ready"), child(end_at_once):
        pass
