from __future__ import annotations

import io
from dataclasses import asdict

from rich.console import Console

from cluster.autoscaler import AutoscaleStatus
from workloads.status_groups import groups_table


def shown(status: AutoscaleStatus) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=120).print(groups_table([asdict(status)]))
    row = next(line for line in out.getvalue().splitlines() if "cpu" in line)
    return [cell.strip() for cell in row.split("│")[1:-1]]


def test_a_group_at_rest() -> None:
    status = AutoscaleStatus("cpu", 2, 2, 2, 1, 8, "utilisation is 50%, to be 60%")
    assert shown(status) == ["cpu", "2", "2", "1 to 8", "utilisation is 50%, to be 60%"]


def test_a_group_that_waits_for_nodes_says_what_it_waits_for() -> None:
    status = AutoscaleStatus("cpu", 1, 2, 3, 1, 8, "[1 of 2] hosts")
    assert shown(status) == ["cpu", "1 of 2", "3", "1 to 8", "[1 of 2] hosts"]
