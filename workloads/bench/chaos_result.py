"""What one run of a scenario showed, of its answers and of what the mesh said of itself meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workloads.bench import chaos_statistics as statistics
from workloads.bench.chaos_load import Answer
from workloads.bench.chaos_plan import Planned
from workloads.bench.chaos_scenario import Scenario
from workloads.bench.chaos_server import Left
from workloads.bench.chaos_statistics import Gap, Reference
from workloads.bench.chaos_watch import Watcher, up_again_ns
from workloads.bench.report import quantiles


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
    split_tables: int
    """Breaks in the one order of epochs, see `chaos_statistics.split_tables`."""
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


def summary(
    scenario: Scenario,
    seed: int,
    begin_ns: int,
    struck: Sequence[Struck],
    answers: Sequence[Answer],
    again: Sequence[Answer],
    expected: Reference,
    watcher: Watcher,
    restored: int | None,
    counted: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Run:
    """`answers` are those of the load. `again` came when the mesh was whole again: all streams begin at once there,
    so that their prompts hold each other up, and only what they are counts, not when they came.
    """
    everything = [*answers, *again]
    times = [fault.at_ns for fault in struck if fault.event.hurts]
    # What else is killed no dispatcher detects: a late answer meanwhile is by chance.
    hosts_hit = [fault.at_ns for fault in struck if fault.event.hurts and not fault.event.process]
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
        outcomes=statistics.outcomes(everything),
        reasons=[*statistics.reasons(everything), *([] if restored else [f"not whole: {_state(watcher)}"])],
        changed_tokens=statistics.changed_tokens(everything, expected),
        split_tables=tables_split(watcher, begin_ns),
        streams_hit=min((statistics.under_way(answers, at_ns) for at_ns in times), default=0),
        gap_before_ms=max((gap.ms for gap in gaps if gap.to_ns <= first), default=None),
        longest_gap_ms=longest,
        added_gap_ms=None if longest is None else max(0.0, longest - expected.gap_p99_ms),
        longest_first_token_ms=statistics.longest_first_token_ms(answers, first),
        itl_p99_ratio=_ratio(hurt, expected),
        detect_ms=statistics.first_after([s.get("last_detect_monotonic_ns") for s in samples], hosts_hit),
        reroute_ms=statistics.first_after([s.get("last_reroute_monotonic_ns") for s in samples], hosts_hit),
        first_refusal_ms=statistics.first_refusal_ms(everything, first),
        next_answer_s=_next_answer_s(everything, up),
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


def tables_split(watcher: Watcher, begin_ns: int) -> int:
    """Breaks in the one order of epochs that the controller and the engine have shown since then."""
    tables = [s.value for s in tuple(watcher.tables) if s.asked_ns >= begin_ns and s.value is not None]
    stats = [s.value for s in tuple(watcher.stats) if s.asked_ns >= begin_ns and s.value is not None]
    return statistics.split_tables(tables, [(int(told["epoch"]), str(told["table"])) for told in stats])


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
