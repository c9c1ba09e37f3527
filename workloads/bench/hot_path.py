"""What the dispatcher adds to every layer of every step: counting the router's choices, and splitting rows.

Of one process, without hosts; beside a dispatch, whose time `bench dispatch` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from actors.routing_counts import RoutingCounts
from actors.row_versions import RowVersions
from actors.split import Split
from cluster.live_versions import LiveVersions, with_version
from cluster.messages import HostCost
from workloads.bench.report import Bar, envelope, now, quantiles

_EXPERTS: Final = 64
_TOP_K: Final = 6
_ROWS: Final = (1, 16, 64, 512)
_HOSTS: Final = (2, 8, 32)
_ROUNDS: Final = 200
# Python's clock and loop cost as much as what is measured: so many calls at once.
_CALLS: Final = 20
# What a layer's dispatch takes at the least, see docs/results/02-dispatch.md: of a whole step it is a part.
_DISPATCH_US: Final = 100.0
_COUNT_SHARE: Final = 0.01
_SPLIT_US: Final = 20.0


def measure(seed: int) -> dict[str, Any]:
    """Microseconds a call, in turn over all sizes."""
    started_at, generator = now(), np.random.default_rng(seed)
    # As skewed as real routing: a few experts take most rows.
    share = generator.dirichlet(np.full(_EXPERTS, 0.5))
    ids = {rows: _ids(generator, share, rows) for rows in _ROWS}
    calls: dict[str, Callable[[], object]] = {}
    counts = RoutingCounts({0: _EXPERTS})
    for rows, chosen in ids.items():
        tensor = torch.from_numpy(chosen)
        calls[f"count, {rows} rows"] = lambda tensor=tensor: counts.note(0, tensor)  # type: ignore[misc]
    for hosts in _HOSTS:
        # Each expert on two hosts side by side, as a planner links them.
        replicas = tuple((expert % hosts, (expert + 1) % hosts) for expert in range(_EXPERTS))
        costs = [HostCost(1e-5, 1e-4 * speed, 1e-6 * speed) for speed in generator.uniform(1, 4, hosts)]
        split = Split(replicas, range(hosts), costs)
        for rows, chosen in ids.items():
            flat = chosen.reshape(-1)
            calls[f"split, {rows} rows, {hosts} hosts"] = lambda split=split, flat=flat: split.owners(flat)  # type: ignore[misc]
    for rows, chosen in ids.items():
        calls[f"two versions, {rows} rows"] = _two_versions(rows, torch.from_numpy(chosen))
    series: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter_ns()
            for _ in range(_CALLS):
                call()
            series[name].append((time.perf_counter_ns() - began) / _CALLS / 1e3)
    medians = {name: quantiles(values).p50 for name, values in series.items()}
    counted = max(medians[f"count, {rows} rows"] for rows in (1, 16))
    bars = [
        Bar("count_share_of_a_dispatch", counted / _DISPATCH_US, _COUNT_SHARE, True),
        Bar("split_us_64_rows_32_hosts", medians["split, 64 rows, 32 hosts"], _SPLIT_US, True),
    ]
    return envelope("bench hot-path", seed=seed, started_at=started_at, series=series, bars=bars)


def _two_versions(rows: int, chosen: torch.Tensor) -> Callable[[], object]:
    """Finding whose rows they are, and their numbers: of a layer in which one of two versions has three experts."""
    base = LiveVersions("one", {"one": {}})
    versions = with_version(base, "two", {0: {1: "a", 7: "b", 9: "c"}}, {0: _EXPERTS})
    requests = max(1, rows // 4)
    runs = [("one" if number % 2 else "two", rows // requests) for number in range(requests)]
    numbers = RowVersions(lambda: runs, lambda unknown: None)
    numbers.set_versions(versions, {0: _EXPERTS})
    return lambda: numbers.numbers(0, chosen)


def _ids(generator: np.random.Generator, share: np.ndarray, rows: int) -> np.ndarray:
    """int32 [rows, K]: distinct experts of each row, by Gumbel's trick for sampling without replacement."""
    scores = np.log(share + 1e-9) + generator.gumbel(size=(rows, _EXPERTS))
    return np.ascontiguousarray(np.argsort(-scores, axis=1)[:, :_TOP_K]).astype(np.int32)


def show(report: dict[str, Any], out: Console) -> None:
    """The series and bars for a terminal."""
    table = Table("call", "us p50", "us p99")
    for name, values in report["series"].items():
        table.add_row(name, f"{values['p50']:.2f}", f"{values['p99']:.2f}")
    out.print(table)
    for key, bar in report["bars"].items():
        out.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
