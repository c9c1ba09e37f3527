"""The chaos report: sums, maxima, bars that can fail, and the picture."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import ConfigError
from workloads.bench.chaos_plan import Planned
from workloads.bench.chaos_plot import plot
from workloads.bench.chaos_report import bars, missed, report, show, summary
from workloads.bench.chaos_result import Run, Struck, line
from workloads.bench.chaos_scenario import Scenario
from workloads.bench.chaos_server import Left
from workloads.plots import check_plot

NONE = dict.fromkeys(("unreachable", "status", "event", "broken", "no-done", "short", "timeout"), 0)
RUN = Run(
    scenario="kill-host",
    seed=0,
    begin_ns=1_000_000_000,
    faults=(Struck(Planned(3.0, "kill", "local-1", None, None, None), 4_002_000_000),),
    outcomes={"ok": 9, "refused": 0, **NONE},
    reasons=[],
    changed_tokens=0,
    split_tables=0,
    streams_hit=16,
    gap_before_ms=20.0,
    longest_gap_ms=120.0,
    added_gap_ms=100.0,
    longest_first_token_ms=90.0,
    itl_p99_ratio=1.5,
    detect_ms=3.0,
    reroute_ms=4.0,
    first_refusal_ms=None,
    next_answer_s=None,
    redundancy_restored_s=6.0,
    whole=True,
    engine_restarts=0,
    counters={"failovers": 2},
    gap_ms=[1.0, 2.0, 120.0],
    throughput=[100, 0, 50],
    plotted=[(3.1, 120.0)],
    unstable_prompts=0,
)
LAST = replace(RUN, seed=1, added_gap_ms=300.0, left=Left((), ()))
SCENARIO = Scenario.model_validate(
    {
        "name": "kill-host",
        "description": "d",
        "events": [{"action": "kill", "host": "any", "at": 3}],
        "checks": {"added_gap_p99_ms": 300, "redundancy_restored_s": 60},
    }
)


def made(*runs: Run) -> dict[str, object]:
    gaps = {"kill-host": [1.0, 2.0]}
    return report([SCENARIO], runs, gaps, seed=0, seeds=len(runs), started_at="t", model="tiny")


def test_sums_and_maxima_of_all_runs() -> None:
    found = summary([replace(RUN, changed_tokens=2, outcomes={**RUN.outcomes, "broken": 1}), LAST])
    assert (found["changed_tokens"], found["errors"], found["refused"]) == (2, 1, 0)
    assert (found["added_gap_ms"], found["added_gap_p99_ms"]) == (300, pytest.approx(298))
    assert found["first_refusal_ms"] is None


def test_what_one_run_lacks_is_not_taken_from_the_others() -> None:
    lacking = replace(RUN, added_gap_ms=None, redundancy_restored_s=None, engine_restarts=None)
    found = summary([lacking, LAST])
    assert found["added_gap_ms"] is found["added_gap_p99_ms"] is found["redundancy_restored_s"] is None
    assert found["engine_restarts"] is None


def test_a_good_run_meets_all_bars() -> None:
    found = made(RUN, LAST)
    assert missed(found) == []
    assert json.loads(json.dumps(found, allow_nan=False))["runs"][0]["faults"][0] == {
        "action": "kill",
        "target": "local-1",
        "planned_s": 3.0,
        "at_s": 3.002,
    }
    keys = {
        "requests",
        "errors",
        "changed_tokens",
        "longest_gap_ms",
        "added_gap_ms",
        "detect_ms",
        "reroute_ms",
    }
    assert keys | {"redundancy_restored_s", "leaked_processes", "tokens_per_s"} <= set(found["runs"][0])  # type: ignore[index]


BROKEN = {
    "errors": replace(LAST, outcomes={**RUN.outcomes, "timeout": 1}),
    "refused": replace(LAST, outcomes={**RUN.outcomes, "refused": 1}),
    "short_answers": replace(LAST, outcomes={**RUN.outcomes, "short": 1}),
    "changed_tokens": replace(LAST, changed_tokens=1),
    "added_gap_p99_ms": replace(LAST, added_gap_ms=5000.0),
    "redundancy_restored_s": replace(LAST, redundancy_restored_s=None, whole=False),
    "split_tables": replace(LAST, split_tables=1),
    "engine_restarts": replace(LAST, engine_restarts=1),
    "not_whole": replace(LAST, whole=False),
    "leaked_processes": replace(LAST, left=Left(("ray::HostActor",), ())),
    "leaked_shared_memory": replace(LAST, left=Left((), ("psm_1",))),
    "leaked_networks": replace(LAST, left=Left((), (), ("em0n0",))),
}


@pytest.mark.parametrize("key", BROKEN)
def test_every_bar_can_be_missed(key: str) -> None:
    assert f"kill-host.{key}" in missed(made(RUN, BROKEN[key]))


def test_a_bar_that_was_not_measured_is_missed_and_a_check_of_null_is_none() -> None:
    checks = SCENARIO.checks.model_copy(update={"first_refusal_ms": 1000, "errors": None})
    found = bars(SCENARIO.model_copy(update={"checks": checks}), summary([RUN]))
    by_key = {bar.key: bar.met for bar in found}
    assert by_key["kill-host.first_refusal_ms"] is None and "kill-host.errors" not in by_key


def test_people_see_runs_reasons_bars_and_what_was_left() -> None:
    left = replace(LAST, reasons=["1 x broken: gone"], left=Left(("ray::HostActor",), ()))
    out = StringIO()
    show(made(RUN, left), Console(file=out, width=300))
    text = out.getvalue()
    assert "kill-host seed 1: 1 x broken: gone" in text and "left ray::HostActor" in text
    assert "missed  kill-host.leaked_processes 1 ≤ 0" in text
    assert "9 requests, 0 errors" in line(RUN)


def test_what_was_skipped_is_reported_with_its_reason() -> None:
    found = report(
        [SCENARIO],
        [RUN, LAST],
        {},
        seed=0,
        seeds=2,
        started_at="t",
        model="tiny",
        skipped={"cut-network": "no ip"},
    )
    assert found["skipped"] == [{"scenario": "cut-network", "reason": "no ip"}]
    assert missed(found) == []
    out = StringIO()
    show(found, Console(file=out, width=300))
    assert "cut-network was skipped: no ip" in out.getvalue()


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "chaos.png"
    check_plot(file)
    plot(made(RUN, replace(LAST, plotted=[], throughput=[])), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    for wrong in (tmp_path / "chaos.svg", tmp_path / "none" / "chaos.png"):
        with pytest.raises(ConfigError, match="the plot"):
            check_plot(wrong)


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib") as error:
        check_plot(tmp_path / "chaos.png")
    assert "expertmesh[bench]" in error.value.hint
