"""The chaos report: one object in the envelope of all measurements, its bars, and its view for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from workloads.bench.chaos_result import Run
from workloads.bench.chaos_scenario import Scenario
from workloads.bench.report import Bar, envelope, quantiles

# Limits on the sum over a scenario's runs, and on the largest of them.
_SUMS: Mapping[str, Callable[[Run], float | None]] = {
    "errors": lambda run: run.errors,
    "refused": lambda run: run.outcomes["refused"],
    "short_answers": lambda run: run.outcomes["short"],
    "changed_tokens": lambda run: run.changed_tokens,
    "split_tables": lambda run: run.split_tables,
    "engine_restarts": lambda run: run.engine_restarts,
    "not_whole": lambda run: int(not run.whole),
    "leaked_processes": lambda run: len(run.left.processes) if run.left else 0,
    "leaked_shared_memory": lambda run: len(run.left.shared_memory) if run.left else 0,
    "leaked_networks": lambda run: len(run.left.networks) if run.left else 0,
}
_LARGEST: Mapping[str, Callable[[Run], float | None]] = {
    "added_gap_ms": lambda run: run.added_gap_ms,
    "longest_gap_ms": lambda run: run.longest_gap_ms,
    "longest_first_token_ms": lambda run: run.longest_first_token_ms,
    "itl_p99_ratio": lambda run: run.itl_p99_ratio,
    "detect_ms": lambda run: run.detect_ms,
    "reroute_ms": lambda run: run.reroute_ms,
    "first_refusal_ms": lambda run: run.first_refusal_ms,
    "redundancy_restored_s": lambda run: run.redundancy_restored_s,
    "next_answer_s": lambda run: run.next_answer_s,
}


def summary(runs: Sequence[Run]) -> dict[str, float | None]:
    """Sums, maxima and the p99 of the added gaps over one scenario's runs.

    None where a run has no value: the largest of the others would pass for all.
    """
    found: dict[str, float | None] = {}
    for name, read in _SUMS.items():
        values = [read(run) for run in runs]
        known = [value for value in values if value is not None]
        found[name] = sum(known) if len(known) == len(values) else None
    for name, read in _LARGEST.items():
        values = [read(run) for run in runs]
        known = [value for value in values if value is not None]
        found[name] = max(known) if known and len(known) == len(values) else None
    added = [run.added_gap_ms for run in runs]
    known = [value for value in added if value is not None]
    found["added_gap_p99_ms"] = quantiles(known).p99 if known and len(known) == len(added) else None
    return found


def bars(scenario: Scenario, found: Mapping[str, float | None]) -> list[Bar]:
    """The scenario's limits, each with what was measured."""
    limits = scenario.checks.model_dump(exclude={"window"}, exclude_none=True)
    return [
        Bar(f"{scenario.name}.{name}", found[name], limit, at_most=True) for name, limit in limits.items()
    ]


def report(
    scenarios: Sequence[Scenario],
    runs: Sequence[Run],
    fault_free: Mapping[str, Sequence[float]],
    *,
    seed: int,
    seeds: int,
    started_at: str,
    model: str,
    skipped: Mapping[str, str] | None = None,
    ended_early: str | None = None,
) -> dict[str, Any]:
    """The object that `--json` writes; `skipped` are scenarios that can't be run here, with why.

    With `ended_early`, which says what ended it, scenarios without a run are left out, and the others may have fewer
    runs than seeds.
    """
    if ended_early is not None:
        scenarios = [s for s in scenarios if any(run.scenario == s.name for run in runs)]
    by_name = {s.name: [run for run in runs if run.scenario == s.name] for s in scenarios}
    summaries = {name: summary(mine) for name, mine in by_name.items()}
    series: dict[str, list[float]] = {f"{name}_fault_free_gap_ms": list(g) for name, g in fault_free.items()}
    for name, mine in by_name.items():
        series[f"{name}_gap_ms"] = [gap for run in mine for gap in run.gap_ms]
        for key in ("added_gap_ms", "redundancy_restored_s", "detect_ms", "reroute_ms"):
            values = [getattr(run, key) for run in mine]
            series[f"{name}_{key}"] = [value for value in values if value is not None]
    return envelope(
        "chaos run",
        seed=seed,
        started_at=started_at,
        series={name: values for name, values in series.items() if values},
        bars=[bar for s in scenarios for bar in bars(s, summaries[s.name])],
        model=model,
        seeds=seeds,
        scenarios={s.name: {"description": s.description, **summaries[s.name]} for s in scenarios},
        runs=[entry(run) for run in runs],
        skipped=[{"scenario": name, "reason": reason} for name, reason in (skipped or {}).items()],
        ended_early=ended_early,
    )


def entry(run: Run) -> dict[str, Any]:
    """One run as JSON; times in seconds from the load's begin."""
    left = run.left
    return {
        "scenario": run.scenario,
        "seed": run.seed,
        "requests": sum(run.outcomes.values()),
        "errors": run.errors,
        "refused": run.outcomes["refused"],
        "outcomes": run.outcomes,
        "reasons": run.reasons,
        "changed_tokens": run.changed_tokens,
        "split_tables": run.split_tables,
        "streams_hit": run.streams_hit,
        "gap_before_ms": run.gap_before_ms,
        "longest_gap_ms": run.longest_gap_ms,
        "added_gap_ms": run.added_gap_ms,
        "longest_first_token_ms": run.longest_first_token_ms,
        "itl_p99_ratio": run.itl_p99_ratio,
        "detect_ms": run.detect_ms,
        "reroute_ms": run.reroute_ms,
        "first_refusal_ms": run.first_refusal_ms,
        "next_answer_s": run.next_answer_s,
        "redundancy_restored_s": run.redundancy_restored_s,
        "whole": run.whole,
        "engine_restarts": run.engine_restarts,
        "counters": run.counters,
        "unstable_prompts": run.unstable_prompts,
        "leaked_processes": None if left is None else len(left.processes),
        "leaked": None if left is None else [*left.processes, *left.shared_memory, *left.networks],
        "faults": [
            {
                "action": fault.event.action,
                "target": fault.event.target,
                **({"name": fault.event.name, "value": fault.event.value} if fault.event.name else {}),
                "planned_s": round(fault.event.at_s, 3),
                "at_s": round((fault.at_ns - run.begin_ns) / 1e9, 3),
            }
            for fault in run.faults
        ],
        "tokens_per_s": run.throughput,
        "gaps": run.plotted,
    }


def missed(found: Mapping[str, Any]) -> list[str]:
    """The bars that are not met; one that was not measured is none that holds."""
    return [key for key, bar in found["bars"].items() if bar["met"] is not True]


def show(found: Mapping[str, Any], console: Console) -> None:
    """The report for people."""
    columns = {
        "requests": "requests",
        "errors": "errors",
        "refused": "refused",
        "changed_tokens": "changed tokens",
        "gap_before_ms": "gap before ms",
        "added_gap_ms": "added gap ms",
        "longest_first_token_ms": "first token ms",
        "detect_ms": "detected ms",
        "reroute_ms": "rerouted ms",
        "redundancy_restored_s": "restored s",
    }
    table = Table("scenario", "seed", *columns.values())
    for run in found["runs"]:
        table.add_row(run["scenario"], str(run["seed"]), *(_cell(run[key]) for key in columns))
    console.print(table)
    for run in found["runs"]:
        for reason in run["reasons"]:
            console.print(f"{run['scenario']} seed {run['seed']}: {reason}", highlight=False, markup=False)
        for name in run["leaked"] or ():
            console.print(f"{run['scenario']} left {name}", highlight=False, markup=False)
    for entry_ in found["skipped"]:
        console.print(f"{entry_['scenario']} was skipped: {entry_['reason']}", highlight=False, markup=False)
    for key, bar in found["bars"].items():
        console.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.1f}"
