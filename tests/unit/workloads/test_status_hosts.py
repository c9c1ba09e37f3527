"""What `status` says of hosts that are repaired."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from cluster.messages import HostAddress, HostReport
from cluster.repair_state import HostStatus
from workloads.status import host_entry, status_view

REPORT = HostReport(HostAddress("h", "n", "unix", "", 5), 4, 2**20, 2 * 2**20, 0.5, "module", 1, 7, 7, 0.1)


def host(state: str, crashes: int = 0, reason: str = "", next_try_s: float | None = None) -> HostStatus:
    return HostStatus("h", "n", state, 1 + crashes, crashes, reason, next_try_s)


def shown(status: HostStatus, report: HostReport | str | None) -> str:
    state = {"url": "u", "model": "m", "ready": True, "table_epoch": 9}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(status_view({**state, "hosts": [host_entry(status, "cpu", report)]}))
    return " ".join(console.export_text().split())


def test_a_host_that_backs_off_says_how_often_why_and_until_when() -> None:
    status = host("backing off", 3, "killed [by a signal]", 3.6)
    text = shown(status, "killed")
    assert "backing off killed [by a signal], 3 crashes, next try in 4 s" in text
    assert "table epoch 9" in text
    entry = host_entry(status, "cpu", "killed")
    assert (entry["state"], entry["crashes"], entry["launches"]) == ("backing off", 3, 4)
    assert (entry["reason"], entry["next_try_s"], entry["node_id"]) == ("killed [by a signal]", 3.6, "n")


def test_a_ready_host_keeps_its_crashes_for_a_while() -> None:
    status = host("ready", 1, "killed")
    assert "ready 1 crash │" in shown(status, REPORT)
    assert host_entry(status, "cpu", REPORT)["pid"] == 5


def test_a_host_that_does_not_answer_is_not_down() -> None:
    assert "not answering does not answer" in shown(host("ready"), "does not answer")


def test_one_that_waits_or_starts() -> None:
    assert "waiting for room node n is gone" in shown(host("waiting for room", 0, "node n is gone"), None)
    assert "starting killed, 1 crash" in shown(host("starting", 1, "killed"), "HostError")


def test_where_copied_experts_came_from_is_shown() -> None:
    assert "│ 4 │" in shown(host("ready"), REPORT)
    copied = replace(REPORT, copied_from=("west-0", "west-1"))
    assert "│ 4 from west-0, west-1 │" in shown(host("ready"), copied)
    assert host_entry(host("ready"), "cpu", copied)["copied_from"] == ("west-0", "west-1")
