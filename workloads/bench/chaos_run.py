"""`expertmesh chaos run`: load, faults, and what clients saw of them.

1. one server for each distinct deployment, in a process of its own
2. fault-free answers of the same prompts under the same load: the reference
3. for each seed the load again, with the scenario's faults at the seed's times
4. wait until the mesh is whole, and ask every stream once more; a mesh that stays hurt is replaced by a fresh one
5. the server ends; what is left of it is counted

Everything happens on this machine, so that all times are of one clock.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import Config
from cluster.errors import ExpertmeshError
from workloads.bench import chaos_statistics as statistics
from workloads.bench.chaos_load import Answer, once, prompts, under_faults
from workloads.bench.chaos_mesh import Mesh, started
from workloads.bench.chaos_scenario import Load, Planned, Scenario, deploy, plan
from workloads.bench.chaos_server import Left, free_port
from workloads.bench.chaos_statistics import Gap, Reference
from workloads.bench.chaos_watch import Watcher, restored_ns, up_again_ns, watching
from workloads.bench.report import quantiles

Note = Callable[[str], None]
_POLL_S = 0.25
_REFERENCE_PASSES = 2


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was carried out."""

    event: Planned
    at_ns: int


@dataclass(frozen=True, slots=True)
class Run:
    """One seed of one scenario. What was not seen is None."""

    scenario: str
    seed: int
    begin_ns: int
    faults: tuple[Struck, ...]
    outcomes: dict[str, int]
    reasons: list[str]
    changed_tokens: int
    streams_hit: int
    """How many streams were under way at each fault, at the least."""
    gap_before_ms: float | None
    """The longest gap of the same run before the first fault: what the machine does by itself."""
    longest_gap_ms: float | None
    added_gap_ms: float | None
    longest_first_token_ms: float | None
    itl_p99_ratio: float | None
    detect_ms: float | None
    reroute_ms: float | None
    first_refusal_ms: float | None
    next_answer_s: float | None
    redundancy_restored_s: float | None
    whole: bool
    engine_restarts: int | None
    counters: dict[str, float]
    """How much failovers, hedges and late_answers of the engine grew, where it counts them."""
    gap_ms: list[float]
    throughput: list[int]
    plotted: list[tuple[float, float]]
    unstable_prompts: int
    left: Left | None = None
    """What outlived the server, on the last run of each server."""

    @property
    def errors(self) -> int:
        """Answers that failed other than by a 503."""
        return sum(self.outcomes.values()) - self.outcomes["ok"] - self.outcomes["refused"]


@dataclass(frozen=True, slots=True)
class Model:
    """What is served: its name and the size of its vocabulary."""

    name: str
    vocabulary: int


def measure(
    scenarios: Sequence[Scenario], seeds: Sequence[int], base: Config, model: Model, note: Note
) -> tuple[list[Run], dict[str, list[float]]]:
    """All runs, and the gaps in milliseconds of the fault-free load by scenario.

    Raises an ExpertmeshError if a server can't start, or its fault-free load fails.
    """
    runs: list[Run] = []
    fault_free: dict[str, list[float]] = {}
    for group in _by_deployment(scenarios, base):
        waiting = [(scenario, seed) for scenario in group for seed in seeds]
        while waiting:
            config = deploy(group[0], base, server={"host": "127.0.0.1", "port": free_port()})
            note(f"starting a server for {', '.join(dict.fromkeys(s.name for s, _ in waiting))}")
            with started(config, model.name, model.vocabulary) as mesh:
                for run in _on_one_server(mesh, waiting, fault_free, note):
                    runs.append(run)
                    waiting.pop(0)
                note("ending the server")
                # The connection is closed after this; Ray's threads here do not mind.
                runs[-1] = replace(runs[-1], left=mesh.end())
    return runs, fault_free


def _by_deployment(scenarios: Sequence[Scenario], base: Config) -> list[list[Scenario]]:
    groups: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        deploy(scenario, base)  # a mistake in the last one is told before the first one starts
        groups.setdefault(json.dumps(scenario.deployment, sort_keys=True), []).append(scenario)
    return list(groups.values())


def _on_one_server(
    mesh: Mesh, waiting: Sequence[tuple[Scenario, int]], fault_free: dict[str, list[float]], note: Note
) -> Iterator[Run]:
    """Runs in order until all are done, or the mesh is not whole again."""
    references: dict[str, Reference] = {}
    with watching(mesh) as watcher:
        for scenario, seed in tuple(waiting):
            load = scenario.load
            # Faults come after so much time; without any, only the prompts count.
            same = load.model_dump_json(exclude={"duration", "repeat"})
            if same not in references:
                note("the fault-free load")
                references[same] = _reference(mesh, load)
            expected = references[same]
            fault_free.setdefault(scenario.name, []).extend(expected.gap_ms)
            run = run_once(mesh, watcher, scenario, seed, expected)
            note(line(run))
            yield run
            if not run.whole:
                note(f"the mesh was not whole within {scenario.recovery:g} s, the next run gets a fresh one")
                return


def run_once(mesh: Mesh, watcher: Watcher, scenario: Scenario, seed: int, expected: Reference) -> Run:
    """One seed: the load with the faults, then recovery, then every stream once more."""
    load, streams = scenario.load, prompts(scenario.load, mesh.vocabulary)
    planned = plan(scenario, tuple(mesh.hosts() or ()), seed)
    pids = mesh.pids(planned)
    before = mesh.stats() or {}
    struck: list[Struck] = []
    begin_ns = time.monotonic_ns()

    async def faults() -> None:
        for event in planned:
            await asyncio.sleep(event.at_s - (time.monotonic_ns() - begin_ns) / 1e9)
            # In a thread where it is a call to a host: the streams are read meanwhile.
            strike = mesh.strike
            quick = event.action != "failpoint"
            at_ns = (
                strike(event, pids[event.target])
                if quick
                else await asyncio.to_thread(strike, event, pids[event.target])
            )
            struck.append(Struck(event, at_ns))

    answers = asyncio.run(under_faults(mesh.url, mesh.name, load, streams, faults))
    dead = frozenset(pids[event.target] for event in planned if event.kills)
    restored = _wait_whole(mesh, watcher, struck[-1].at_ns, dead, scenario.recovery)
    after = mesh.stats() or {}
    if restored is not None:
        answers += asyncio.run(once(mesh.url, mesh.name, load.model_copy(update={"prompts": 1}), streams))
    return _summary(scenario, seed, begin_ns, struck, answers, expected, watcher, restored, (before, after))


def _reference(mesh: Mesh, load: Load) -> Reference:
    streams = prompts(load, mesh.vocabulary)
    # Once for warming up: first requests may compile or allocate.
    asyncio.run(once(mesh.url, mesh.name, load.model_copy(update={"prompts": 1}), streams))
    answers = asyncio.run(once(mesh.url, mesh.name, load, streams, _REFERENCE_PASSES))
    try:
        return statistics.reference(answers)
    except ValueError as error:
        raise ExpertmeshError(
            f"an answer failed before there was any fault ({error})", "mend that first: `expertmesh status`"
        ) from error


def _wait_whole(
    mesh: Mesh, watcher: Watcher, last_fault_ns: int, dead: frozenset[int], recovery_s: float
) -> int | None:
    """When the mesh had its redundancy again, once it is ready too; None past `recovery_s`."""
    deadline = time.monotonic() + recovery_s
    while time.monotonic() < deadline:
        restored = restored_ns(tuple(watcher.hosts), tuple(watcher.stats), last_fault_ns, dead)
        if restored is not None and mesh.ready():
            return restored
        time.sleep(_POLL_S)
    return None


def _summary(
    scenario: Scenario,
    seed: int,
    begin_ns: int,
    struck: Sequence[Struck],
    answers: list[Answer],
    expected: Reference,
    watcher: Watcher,
    restored: int | None,
    counted: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Run:
    times = [fault.at_ns for fault in struck if fault.event.hurts]
    first, last = struck[0].at_ns, struck[-1].at_ns
    window = scenario.checks.window
    gaps = statistics.gaps(answers)
    hurt = statistics.in_window(gaps, first, None if window is None else last + int(window * 1e9))
    longest = max((gap.ms for gap in hurt), default=None)
    samples = [s.value for s in tuple(watcher.stats) if s.asked_ns >= first and s.value is not None]
    up = up_again_ns(tuple(watcher.stats), first)
    before, after = counted
    both = [before.get("pid"), after.get("pid")]
    return Run(
        scenario=scenario.name,
        seed=seed,
        begin_ns=begin_ns,
        faults=tuple(struck),
        outcomes=statistics.outcomes(answers),
        reasons=[*statistics.reasons(answers), *([] if restored else [f"not whole: {_state(watcher)}"])],
        changed_tokens=statistics.changed_tokens(answers, expected),
        streams_hit=min((statistics.under_way(answers, at_ns) for at_ns in times), default=0),
        gap_before_ms=max((gap.ms for gap in gaps if gap.to_ns <= first), default=None),
        longest_gap_ms=longest,
        added_gap_ms=None if longest is None else max(0.0, longest - expected.gap_p99_ms),
        longest_first_token_ms=statistics.longest_first_token_ms(answers, first),
        itl_p99_ratio=_ratio(hurt, expected),
        detect_ms=statistics.first_after([s.get("last_detect_monotonic_ns") for s in samples], times),
        reroute_ms=statistics.first_after([s.get("last_reroute_monotonic_ns") for s in samples], times),
        first_refusal_ms=statistics.first_refusal_ms(answers, first),
        next_answer_s=_next_answer_s(answers, up),
        redundancy_restored_s=None if restored is None else (restored - first) / 1e9,
        whole=restored is not None,
        engine_restarts=None if None in both else int(both[0] != both[1]),
        counters={
            # Another engine began to count anew.
            key: after[key] - (before.get(key, 0) if both[0] == both[1] else 0)
            for key in ("reconnects", "failovers", "hedges", "late_answers")
            if key in after
        },
        gap_ms=[gap.ms for gap in hurt],
        throughput=statistics.throughput(answers, begin_ns),
        plotted=statistics.plotted_gaps(gaps, begin_ns),
        unstable_prompts=expected.unstable_prompts,
    )


def _state(watcher: Watcher) -> str:
    """What the mesh said last of its hosts and its engine."""
    hosts, stats = watcher.hosts[-1].value if watcher.hosts else None, watcher.stats[-1].value
    down = "the controller does not answer" if hosts is None else [h for h, pid in hosts.items() if not pid]
    ejected = "the engine does not answer" if stats is None else f"{stats.get('ejected')} ejected"
    return f"hosts not ready: {down or 'none'}; {ejected}"


def _ratio(hurt: Sequence[Gap], expected: Reference) -> float | None:
    return quantiles([gap.ms for gap in hurt]).p99 / expected.gap_p99_ms if hurt else None


def _next_answer_s(answers: Sequence[Answer], up_ns: int | None) -> float | None:
    if up_ns is None:
        return None
    ended = [answer.ended_ns for answer in answers if answer.outcome == "ok" and answer.ended_ns > up_ns]
    return (min(ended) - up_ns) / 1e9 if ended else None


def line(run: Run) -> str:
    """A run in one line, for people."""
    gap = "-" if run.added_gap_ms is None else f"{run.added_gap_ms:.0f} ms"
    restored = "-" if run.redundancy_restored_s is None else f"{run.redundancy_restored_s:.1f} s"
    return (
        f"{run.scenario} seed {run.seed}: {sum(run.outcomes.values())} requests, {run.errors} errors, "
        f"{run.outcomes['refused']} refused, {run.changed_tokens} changed tokens, added gap {gap}, "
        f"restored after {restored}"
    )
