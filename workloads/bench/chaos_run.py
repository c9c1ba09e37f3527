"""`expertmesh chaos run`: load, faults, and what clients saw of them.

1. one server for each distinct deployment, in a process of its own
2. fault-free answers of the same prompts under the same load: the reference
3. for each seed the load again, with the scenario's faults at the seed's times, the first once all hosts are in use
4. wait until the mesh is whole, and ask every stream once more; a mesh that stays hurt is replaced by a fresh one
5. the server ends; what is left of it is counted

Everything happens on this machine, so that all times are of one clock.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cluster.config import Config
from cluster.errors import ExpertmeshError
from workloads.bench import chaos_statistics as statistics
from workloads.bench.chaos_load import Answer, once, prompts, under_faults
from workloads.bench.chaos_mesh import Mesh, started
from workloads.bench.chaos_plan import plan
from workloads.bench.chaos_result import Run, Struck, line, summary
from workloads.bench.chaos_scenario import Load, Scenario, deploy
from workloads.bench.chaos_statistics import Reference
from workloads.bench.chaos_watch import Watcher, all_in_use, restored_ns, watching
from workloads.bench.ports import free_port

Note = Callable[[str], None]
_POLL_S = 0.25
_REFERENCE_PASSES = 2
# Where the machine has much else to do, a host may be out for being late; what befalls it then nobody would notice.
_IN_USE_S = 10.0


@dataclass(frozen=True, slots=True)
class Model:
    """What is served: its name and the size of its vocabulary."""

    name: str
    vocabulary: int


@dataclass
class Measured:
    """What there is so far: hours of it are not to be lost with the last minute."""

    runs: list[Run] = field(default_factory=list)
    fault_free: dict[str, list[float]] = field(default_factory=dict)
    """By scenario the gaps of the fault-free load, in milliseconds."""


def measure(
    scenarios: Sequence[Scenario],
    seeds: Sequence[int],
    base: Config,
    model: Model,
    note: Note,
    measured: Measured,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Fill `measured`, run by run; `keep` is called after each.

    Raises an ExpertmeshError if a server can't start, or its fault-free load fails.
    """
    runs, fault_free = measured.runs, measured.fault_free
    for group in _by_deployment(scenarios, base):
        waiting = [(scenario, seed) for scenario in group for seed in seeds]
        while waiting:
            config = deploy(group[0], base, server={"host": "127.0.0.1", "port": free_port()})
            note(f"starting a server for {', '.join(dict.fromkeys(s.name for s, _ in waiting))}")
            with started(config, model.name, model.vocabulary, group[0].cluster) as mesh:
                for run in _on_one_server(mesh, waiting, fault_free, note):
                    runs.append(run)
                    waiting.pop(0)
                    keep()
                note("ending the server")
                runs[-1] = replace(runs[-1], left=mesh.end())


def _by_deployment(scenarios: Sequence[Scenario], base: Config) -> list[list[Scenario]]:
    groups: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        deploy(scenario, base)  # a mistake in the last one is told before the first one starts
        same = scenario.model_dump(mode="json", include={"deployment", "cluster"})
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(scenario)
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
            mesh.restore()


def run_once(mesh: Mesh, watcher: Watcher, scenario: Scenario, seed: int, expected: Reference) -> Run:
    """One seed: the load with the faults, then recovery, then every stream once more."""
    load, streams = scenario.load, prompts(scenario.load, mesh.vocabulary)
    planned = plan(scenario, tuple(mesh.hosts() or ()), seed, mesh.zones() if scenario.cluster else ())
    pids = mesh.pids(planned)
    before = mesh.stats() or {}
    struck: list[Struck] = []
    begin_ns = time.monotonic_ns()

    async def faults() -> None:
        held_up_s = 0.0
        for event in planned:
            await asyncio.sleep(event.at_s + held_up_s - (time.monotonic_ns() - begin_ns) / 1e9)
            if event is planned[0]:
                held_up_s = await _until_in_use(watcher)
            # In a thread where it takes a while: the streams are read meanwhile.
            strike = mesh.strike
            quick = (
                event.action in ("kill", "stop", "continue") and not event.node and event.process != "head"
            )
            at_ns = (
                strike(event, pids[event.target])
                if quick
                else await asyncio.to_thread(strike, event, pids[event.target])
            )
            struck.append(Struck(event, at_ns))

    answers = asyncio.run(under_faults(mesh.url, mesh.name, load, streams, faults))
    dead = frozenset().union(*(pids[event.target] for event in planned if event.kills))
    restored = _wait_whole(mesh, watcher, struck[-1].at_ns, dead, scenario.recovery)
    after = mesh.stats() or {}
    again: list[Answer] = []
    if restored is not None:
        again = asyncio.run(once(mesh.url, mesh.name, load.model_copy(update={"prompts": 1}), streams))
    return summary(
        scenario, seed, begin_ns, struck, answers, again, expected, watcher, restored, (before, after)
    )


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


async def _until_in_use(watcher: Watcher) -> float:
    """Wait until the engine asks every host; for how many seconds that was."""
    began = time.monotonic()
    while not all_in_use(tuple(watcher.stats)) and time.monotonic() - began < _IN_USE_S:
        await asyncio.sleep(_POLL_S)
    return time.monotonic() - began


def _wait_whole(
    mesh: Mesh, watcher: Watcher, last_fault_ns: int, dead: frozenset[int], recovery_s: float
) -> int | None:
    """When the mesh had its redundancy again, once it is ready too; None past `recovery_s`."""
    deadline = time.monotonic() + recovery_s
    while time.monotonic() < deadline:
        restored = restored_ns(tuple(watcher.hosts), tuple(watcher.stats), last_fault_ns, dead)
        if restored is not None and not mesh.changing() and mesh.ready():
            return restored
        time.sleep(_POLL_S)
    return None
