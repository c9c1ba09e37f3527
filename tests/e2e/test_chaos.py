"""`expertmesh chaos run` on a tiny model: the bars of failover, checks that can fail, Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.e2e.programs import Program, free_port, settings, wait_for

pytestmark = pytest.mark.slow

# Switched on once engines fail over and the controller repairs.
WAITS_FOR_FAILOVER = pytest.mark.skip(
    reason="waits for failover in the dispatcher and repair in the controller"
)
RUN_S = 550.0

CANNOT_HOLD = """
description: Freezes a host whose experts nobody else holds, and asks that no client sees it
deployment: {placement: {replicas: 1}}
load: {streams: 4, duration: 8s, prompts: 2}
events:
  - {action: stop, host: any, at: 2s}
  - {action: continue, host: same, after: 3s}
checks: {added_gap_p99_ms: 500}
"""
SLOW = """
description: Makes one of two hosts so slow that it shows, with nobody else to ask
deployment: {placement: {replicas: 1}}
load: {streams: 4, duration: 8s, prompts: 2}
events:
  - {action: failpoint, host: local-0, name: slow_floor_ms, value: 60, at: 1s}
  - {action: failpoint, host: same, name: slow, value: 10, after: 100ms}
  - {action: failpoint, host: same, name: slow, value: 1, after: 4s}
checks: {itl_p99_ratio: 2, errors: null, refused: null}
"""


def start(folder: Path, model: Path, *arguments: str) -> Program:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mesh.yaml").write_text(yaml.safe_dump(settings(model, free_port())))
    return Program(folder, ["chaos", "run", *arguments, "--config", str(folder / "mesh.yaml")])


def measured(folder: Path, model: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code with --check, and the report; nothing of it may be left."""
    program = start(folder, model, *arguments, "--json", "report.json", "--no-plot", "--check")
    try:
        code = program.wait(RUN_S)
        assert (folder / "report.json").exists(), program.err
        program.assert_gone()
        return code, json.loads((folder / "report.json").read_text())
    finally:
        program.kill()


def missed(report: dict[str, Any]) -> set[str]:
    return {key for key, bar in report["bars"].items() if bar["met"] is not True}


@WAITS_FOR_FAILOVER
@pytest.mark.parametrize("name", ["kill-host", "freeze-host", "kill-unreplicated"])
def test_the_bars_of_a_host_that_is_lost(tiny_model: Path, tmp_path: Path, name: str) -> None:
    code, report = measured(tmp_path, tiny_model, name, "--seeds", "2")
    assert (code, missed(report)) == (0, set()), report["bars"]
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    for run in report["runs"]:
        assert run["requests"] > 16 and run["streams_hit"] > 0 and sum(run["tokens_per_s"]) > 0
        assert run["outcomes"]["ok"] > 0 and run["faults"]
        if name == "kill-host":
            assert run["detect_ms"] is not None and run["detect_ms"] < 1000
        if name == "kill-unreplicated":
            assert run["refused"] > 0


@WAITS_FOR_FAILOVER
def test_two_of_three_hosts_and_the_processes_beside_them(tiny_model: Path, tmp_path: Path) -> None:
    names = ("kill-two-hosts", "kill-controller", "kill-router")
    code, report = measured(tmp_path, tiny_model, *names, "--seeds", "1")
    assert (code, missed(report)) == (0, set()), report["bars"]
    router = next(run for run in report["runs"] if run["scenario"] == "kill-router")
    # Streams were broken, and none of them passed for whole.
    assert router["outcomes"]["broken"] > 0 and router["outcomes"]["short"] == 0


def test_a_check_that_cannot_hold_is_missed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "cannot-hold.yaml").write_text(CANNOT_HOLD)
    code, report = measured(tmp_path, tiny_model, "cannot-hold.yaml", "--seeds", "1")
    assert code == 1
    # Clients wait for the host, or are refused: either is seen.
    assert missed(report) & {"cannot-hold.added_gap_p99_ms", "cannot-hold.refused"}
    run = report["runs"][0]
    assert [fault["action"] for fault in run["faults"]] == ["stop", "continue"]
    assert run["leaked_processes"] == 0 and run["whole"] and run["changed_tokens"] == 0


def test_a_slow_host_is_slow(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text(SLOW)
    code, report = measured(tmp_path, tiny_model, "slow.yaml", "--seeds", "1")
    assert code == 1 and "slow.itl_p99_ratio" in missed(report)
    run = report["runs"][0]
    assert run["whole"] and run["changed_tokens"] == 0
    # 60 ms for each of two layers while it is slow; quick again after the last event.
    assert run["longest_gap_ms"] > 60 or run["refused"]


def test_ctrl_c_ends_all_and_continues_what_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "cannot-hold.yaml").write_text(CANNOT_HOLD.replace("after: 3s", "after: 60s"))
    program = start(tmp_path, tiny_model, "cannot-hold.yaml", "--seeds", "1")
    try:
        wait_for(lambda: stopped(program), RUN_S / 2, "a host to be stopped")
        program.interrupt()
        assert program.wait() == 130, program.err
        assert "Traceback" not in program.err
        program.assert_gone()
    finally:
        program.kill()


def stopped(program: Program) -> bool:
    assert program.process.poll() is None, program.err
    return any(process.status() == psutil.STATUS_STOPPED for process in program.processes())
