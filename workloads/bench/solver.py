"""`expertmesh bench solver`: the planner's search beside HiGHS's mixed-integer solver, on layers of growing size.

Both place one layer's experts on hosts of unequal speed and room, for one load. HiGHS proves its optimum, or runs out
of time and says how far it may be from it; the search proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.fleet import FleetHost, LayerLoad, PlanSettings
from cluster.messages import HostCost
from cluster.planner import plan
from workloads.bench.placement_exact import least_placement
from workloads.bench.report import Bar, envelope, now

SIZES: Final = ((8, 4), (12, 4), (16, 6), (24, 8), (64, 8), (128, 16), (256, 32))
"""(experts, hosts)."""
_SPEEDS: Final = (1.0, 4.0, 1.0, 16.0)
_SPARE: Final = 1.125
_WITHIN: Final = 1.1


@dataclass(frozen=True, slots=True)
class Case:
    """One layer, placed by both."""

    experts: int
    hosts: int
    seed: int
    ours: float
    """Seconds of the slowest host, at one second a row on a host of speed 1."""
    ours_took_s: float
    highs: float
    highs_bound: float
    """What no placement is below."""
    highs_took_s: float
    optimal: bool
    """Whether HiGHS proved that nothing is better."""


def measure(
    seeds: int, limit_s: float, note: Callable[[str], None], sizes: Sequence[tuple[int, int]] = SIZES
) -> dict[str, Any]:
    """Both solvers on `seeds` random layers of each size."""
    started_at = now()
    # Compiled and loaded before anything is timed.
    place(np.ones(2), [1.0, 1.0], [2, 2])
    cases = []
    for experts, hosts in sizes:
        for seed in range(seeds):
            case = compare(experts, hosts, seed, limit_s)
            cases.append(case)
            note(
                f"{experts} experts, {hosts} hosts, seed {seed}: search {case.ours:.4g} in {case.ours_took_s:.2f} s, "
                f"HiGHS {case.highs:.4g} in {case.highs_took_s:.1f} s{'' if case.optimal else ', not proved'}"
            )
    solved = [case.ours / case.highs for case in cases if case.optimal]
    return envelope(
        "bench solver",
        seed=0,
        started_at=started_at,
        series={
            "ours_s": [case.ours_took_s for case in cases],
            "highs_s": [case.highs_took_s for case in cases],
        },
        bars=[Bar("ours_over_optimum_at_most", max(solved, default=1.0), _WITHIN, True)],
        limit_s=limit_s,
        cases=[asdict(case) for case in cases],
    )


def compare(experts: int, hosts: int, seed: int, limit_s: float) -> Case:
    """One random layer: Zipf's loads, speeds 1 : 4 : 16, an eighth more slots than experts, unevenly divided."""
    generator = np.random.default_rng((seed, experts, hosts))
    rows = generator.zipf(1.6, experts).clip(1, 60).astype(np.float64)
    speeds = [_SPEEDS[h % len(_SPEEDS)] for h in range(hosts)]
    shares = generator.dirichlet(np.full(hosts, 8.0)) * experts * _SPARE
    slots = np.clip(np.ceil(shares), 1, experts).astype(int).tolist()
    begun = time.perf_counter()
    ours = place(rows, speeds, slots)
    ours_took = time.perf_counter() - begun
    begun = time.perf_counter()
    exact = least_placement(rows, speeds, slots, limit_s)
    return Case(
        experts,
        hosts,
        seed,
        ours,
        ours_took,
        exact.seconds,
        exact.bound,
        time.perf_counter() - begun,
        exact.optimal,
    )


def place(rows: np.ndarray, speeds: Sequence[float], slots: Sequence[int]) -> float:
    """Seconds of the slowest host under the planner's placement."""
    hosts = [
        FleetHost(f"host-{n}", room, HostCost(per_row_s=1 / speed))
        for n, (speed, room) in enumerate(zip(speeds, slots, strict=True))
    ]
    load = LayerLoad(0, 1, rows[None, :], np.minimum(rows[None, :], 1.0))
    return plan(hosts, [load], None, PlanSettings()).seconds


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    table = Table("experts", "hosts", "seed", "search", "s", "HiGHS", "bound", "s", "proved")
    for case in report["cases"]:
        table.add_row(
            *(str(case[key]) for key in ("experts", "hosts", "seed")),
            f"{case['ours']:.4g}",
            f"{case['ours_took_s']:.3f}",
            f"{case['highs']:.4g}",
            f"{case['highs_bound']:.4g}",
            f"{case['highs_took_s']:.1f}",
            "yes" if case["optimal"] else "no",
        )
    console.print(table)
    for key, bar in report["bars"].items():
        console.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
