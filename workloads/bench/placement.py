"""`expertmesh bench placement`: the planner and the split on real routing, beside EPLB, round-robin and random.

Statistics are of the trace's first half, judgement of the second. All methods get the same slots: on H equal hosts
ceil(experts · redundancy / H) of each layer. EPLB, round-robin and random share an expert's load evenly over its
copies, as they are defined; `ours` splits the load at hand.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from cluster.fleet import FleetHost, PlanSettings
from cluster.planner import FleetPlan, plan
from cluster.precompile import precompile
from cluster.split import LayerSplit
from workloads.bench.placement_baselines import Copies, at_random, eplb, round_robin
from workloads.bench.placement_fleet import equal_hosts, read_fleet, slots_of
from workloads.bench.placement_replay import EvenLevels, Levels, SplitLevels, judge
from workloads.bench.placement_requests import Engine, Request, read_requests, replay, summary
from workloads.bench.placement_shift import Shift, shifted
from workloads.bench.placement_trace import Trace, loads_of, read_trace, scaled
from workloads.bench.report import Bar, envelope, now

BARS = {8: 0.90, 16: 0.60, 32: 0.45}
"""By number of hosts, at 1.25 copies: the part of EPLB's distance to an even load that is to be closed."""
_BAR_REDUNDANCY = 1.25
_LARGE = 61, 256
PLAN_BARS = {64: 1.0, 10_000: 60.0}
"""By number of hosts, for a model of so many layers and experts: seconds that planning may take."""
_MEMORY_BAR = 2e9
_SPLIT_HOSTS, _SPLIT_EXPERTS = 32, 64
_EXACT_SWEEPS = 500


@dataclass(frozen=True, slots=True)
class Settings:
    """What is compared."""

    trace: Path
    shift_to: Path | None = None
    fleet: Path | None = None
    """A described fleet, in place of equal hosts."""
    layers: int | None = None
    experts: int | None = None
    """The trace scaled to so many."""
    requests: Path | None = None
    """Real requests, replayed over every fleet and placement."""
    number: int = 500
    """Of them, the first so many."""
    rate: float = 1.0
    """They come so many times as fast as they came."""
    hosts: tuple[int, ...] = (8, 16, 32)
    redundancies: tuple[float, ...] = (1.0, 1.125, 1.25, 1.5)
    batch: int = 256
    tries: int = 6000
    methods: tuple[str, ...] = ("ours", "eplb", "round_robin", "random")
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One method on one fleet."""

    method: str
    hosts: int
    redundancy: float
    balancedness: float
    step_time: float
    """Median seconds of a step's experts, all layers, at one microsecond a row and host."""
    step_time_p99: float
    moved_blobs: int
    plan_s: float


def measure(settings: Settings, note: Callable[[str], None]) -> tuple[dict[str, Any], FleetPlan]:
    """The report, and the plan with the most hosts and copies, to be drawn. ConfigError for bad traces."""
    started_at = now()
    # Loading compiled code takes a third of a second, once.
    precompile()
    trace = read_trace(settings.trace)
    if settings.layers or settings.experts:
        trace = scaled(trace, settings.layers or trace.layers, settings.experts or trace.num_experts)
    target = read_trace(settings.shift_to) if settings.shift_to is not None else None
    requests = _requests(settings)
    results: list[Result] = []
    replays: list[dict[str, Any]] = []
    last_plan: FleetPlan | None = None
    for hosts, redundancy in _fleets(settings, trace):
        note(f"{len(hosts)} hosts, {redundancy:.4g} copies of {trace.layers} x {trace.num_experts} experts")
        found, levels, last_plan = compare(trace, hosts, redundancy, settings)
        results.extend(found)
        for method, made in levels.items() if requests else ():
            note(f"{len(requests)} requests, {method}")
            told = summary(replay(trace, requests, len(hosts), made, Engine()))
            replays.append({"method": method, "hosts": len(hosts), "redundancy": redundancy, **told})
    assert last_plan is not None
    bars = list(_bars(results, equal=settings.fleet is None))
    if (trace.layers, trace.num_experts) == _LARGE:
        bars += _size_bars(results)
    fields: dict[str, Any] = {"trace": trace.name, "tokens": trace.tokens, "batch": settings.batch}
    if target is not None:
        note(f"shift to {target.name}")
        shift = shifted(trace, target, settings.seed)
        bars += _shift_bars(shift)
        fields["shift"] = asdict(shift)
    split_us = split_cost(trace)
    if trace.num_experts == _SPLIT_EXPERTS:
        bars.append(Bar(f"split_us_p50_{_SPLIT_HOSTS}_hosts", float(np.median(split_us)), 20.0, True))
    report = envelope(
        "bench placement",
        seed=settings.seed,
        started_at=started_at,
        series={"split_us": split_us},
        bars=bars,
        **fields,
        results=[asdict(result) for result in results],
        requests=replays,
    )
    return report, last_plan


def _fleets(settings: Settings, trace: Trace) -> Iterator[tuple[list[FleetHost], float]]:
    if settings.fleet is not None:
        hosts = read_fleet(settings.fleet, trace.layers)
        yield hosts, sum(host.memory_bytes for host in hosts) / (trace.layers * trace.num_experts)
        return
    for number in settings.hosts:
        for redundancy in settings.redundancies:
            slots = slots_of(trace.num_experts, redundancy, number)
            yield equal_hosts(number, slots, trace.layers), redundancy


def compare(
    trace: Trace, hosts: Sequence[FleetHost], redundancy: float, settings: Settings
) -> tuple[list[Result], dict[str, Levels], FleetPlan]:
    """All methods on one fleet, whose hosts have as many slots of every layer; and what each makes of a step."""
    half = trace.tokens // 2
    per_host = np.array([min(host.memory_bytes // trace.layers, trace.num_experts) for host in hosts])
    if per_host.sum() < trace.num_experts:
        raise ConfigError(
            f"{len(hosts)} hosts have {per_host.sum()} slots for a layer's {trace.num_experts} experts",
            "give the hosts more slots, or add hosts",
        )
    costs = [host.cost for host in hosts]
    seen = trace.counts(0, half)
    rng = np.random.default_rng(settings.seed)
    results = []
    made: dict[str, Levels] = {}

    def add(method: str, plan_s: float, moved: int, whole: Levels, step: Levels) -> None:
        made[method] = step
        judged = judge(trace, half, trace.tokens, settings.batch, whole, step)
        results.append(
            Result(
                method,
                len(hosts),
                redundancy,
                judged.balancedness,
                judged.step_p50_s,
                judged.step_p99_s,
                moved,
                plan_s,
            )
        )

    begin = time.perf_counter()
    planned = plan(
        hosts,
        loads_of(trace.windows(0, half), settings.batch * trace.top_k),
        None,
        PlanSettings(tries=settings.tries, seed=settings.seed),
    )
    plan_s = time.perf_counter() - begin
    placed = [layer.holders for layer in planned.layers]
    whole = SplitLevels(placed, costs, sweeps=_EXACT_SWEEPS)
    add("ours", plan_s, planned.moved, whole, SplitLevels(placed, costs))
    baselines: Mapping[str, Callable[[int], Copies]] = {
        "eplb": lambda layer: eplb(seen[layer], per_host),
        "round_robin": lambda layer: round_robin(trace.num_experts, per_host),
        "random": lambda layer: at_random(trace.num_experts, per_host, rng),
    }
    for method, make in baselines.items():
        if method not in settings.methods:
            continue
        begin = time.perf_counter()
        copies = [make(layer) for layer in range(trace.layers)]
        plan_s = time.perf_counter() - begin
        levels = EvenLevels(copies, costs)
        add(method, plan_s, int(per_host.sum()) * trace.layers, levels, levels)
    return results, made, planned


def _requests(settings: Settings) -> list[Request]:
    if settings.requests is None:
        return []
    found = read_requests(settings.requests, settings.number)
    return [request.model_copy(update={"timestamp": request.timestamp / settings.rate}) for request in found]


def split_cost(trace: Trace, steps: int = 2000) -> list[float]:
    """Microseconds of each split of steps of 64 tokens, of one layer at 1.25 copies, begun where the last ended."""
    half, batch = trace.tokens // 2, 64
    hosts = equal_hosts(_SPLIT_HOSTS, slots_of(trace.num_experts, _BAR_REDUNDANCY, _SPLIT_HOSTS), 1)
    first = Trace(trace.name, trace.expert_ids[:1], trace.num_experts)
    planned = plan(
        hosts, loads_of(first.windows(0, half), batch * trace.top_k), None, PlanSettings(tries=500)
    )
    split = LayerSplit(planned.layers[0].holders, [host.cost for host in hosts])
    starts = half + np.arange(steps) * batch % max(1, trace.tokens - half - batch)
    loads = [first.counts(int(at), int(at) + batch)[0] for at in starts]
    split.update(loads[0])
    taken = []
    for load in loads:
        begin = time.perf_counter_ns()
        split.update(load)
        taken.append((time.perf_counter_ns() - begin) / 1e3)
    return taken


def _bars(results: Sequence[Result], *, equal: bool) -> list[Bar]:
    found = {(r.method, r.hosts, r.redundancy): r for r in results}
    bars = []
    for (method, hosts, redundancy), ours in found.items():
        if method != "ours":
            continue
        theirs = found.get(("eplb", hosts, redundancy))
        if theirs is None:
            continue
        key = f"{hosts}_hosts_{redundancy:g}"
        if not equal:
            bars.append(Bar(f"eplb_step_time_over_ours_{key}", theirs.step_time / ours.step_time, 1.5, False))
            continue
        if redundancy == _BAR_REDUNDANCY and hosts in BARS:
            closed = (ours.balancedness - theirs.balancedness) / max(1e-12, 1 - theirs.balancedness)
            bars.append(Bar(f"closed_{key}", closed, BARS[hosts], False))
        bars.append(Bar(f"over_eplb_{key}", ours.balancedness - theirs.balancedness, 0.0, False))
    return bars


def _size_bars(results: Sequence[Result]) -> list[Bar]:
    ours = [result for result in results if result.method == "ours" and result.hosts in PLAN_BARS]
    bars = [Bar(f"plan_s_{r.hosts}_hosts_{r.redundancy:g}", r.plan_s, PLAN_BARS[r.hosts], True) for r in ours]
    # Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return [*bars, Bar("peak_memory_bytes", peak, _MEMORY_BAR, True)]


def _shift_bars(shift: Shift) -> list[Bar]:
    return [
        Bar("shift_recovered", shift.recovered, 0.9, False),
        Bar("shift_moved_over_needed", shift.moved / max(1, shift.needed), 2.0, True),
    ]


def show(report: Mapping[str, Any], console: Console) -> None:
    """The report for people."""
    table = Table("hosts", "copies", "method", "balancedness", "step ms", "p99 ms", "blobs", "plan s")
    for row in report["results"]:
        table.add_row(
            str(row["hosts"]),
            f"{row['redundancy']:g}",
            row["method"],
            f"{row['balancedness']:.4f}",
            f"{row['step_time'] * 1e3:.3f}",
            f"{row['step_time_p99'] * 1e3:.3f}",
            str(row["moved_blobs"]),
            f"{row['plan_s']:.2f}",
        )
    console.print(table)
    if report["requests"]:
        names = ("tokens/s", "experts p50/p99 ms", "first token p50/p99 s", "token ms", "balance")
        replayed = Table("hosts", "copies", "method", *names)
        for row in report["requests"]:
            replayed.add_row(
                str(row["hosts"]),
                f"{row['redundancy']:g}",
                row["method"],
                f"{row['tokens_per_s']:.0f}",
                f"{row['experts_s_p50'] * 1e3:.2f} / {row['experts_s_p99'] * 1e3:.2f}",
                f"{row['first_token_s_p50']:.3f} / {row['first_token_s_p99']:.3f}",
                f"{row.get('per_token_s_p50', 0.0) * 1e3:.2f}",
                f"{row['balance']:.4f}",
            )
        console.print(replayed)
    for key, bar in report["bars"].items():
        console.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
