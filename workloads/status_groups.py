"""The autoscaled groups in `expertmesh status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Column, Table


def groups_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """One row per group; `groups` are `cluster.autoscaler.AutoscaleStatus` as the status' JSON has them."""
    table = Table(Column("group", no_wrap=True), "hosts", "target", "bounds", Column("why", ratio=1))
    for group in groups:
        ready, wanted, target = group["hosts_ready"], group["hosts_wanted"], group["target"]
        table.add_row(
            group["group"],
            f"{wanted}" if ready == wanted else f"[yellow]{ready} of {wanted}[/]",
            f"{target}" if target == wanted else f"[yellow]{target}[/]",
            f"{group['least']} to {group['most']}",
            escape(group["reason"]),
        )
    return table
