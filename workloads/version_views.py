"""Versions as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.table import Table

from cluster.versions.views import SHOWN


def list_view(found: Mapping[str, Any]) -> Group:
    """`listing` for a terminal."""
    table = Table("version", "created", "author", "experts", "tensors", "parent", "aliases", "reason")
    for version in found["versions"]:
        table.add_row(
            version["digest"][:SHOWN],
            _when(version["created"]),
            version["author"],
            str(version["experts"]),
            str(version["dense"]),
            version["parent"][:SHOWN],
            ", ".join(version["aliases"]),
            version["error"] or version["reason"],
        )
    return Group(_grid({"store": found["store"]}), table)


def about_view(found: Mapping[str, Any]) -> Group:
    """`about` for a terminal."""
    head = _grid(
        {
            "version": found["digest"],
            "store": found["store"],
            "parent": found["parent"] or "(the base checkpoint)",
            "created": _when(found["created"]),
            "author": found["author"],
            "reason": found["reason"],
            "signature": found["signature"],
            **_numbers_of_experts(found),
            "blobs missing": ", ".join(digest[:SHOWN] for digest in found["missing"]) or "none",
            **{f"metric {name}": f"{value:g}" for name, value in found["metrics"].items()},
        }
    )
    return Group(
        head,
        _changes({layer: list(experts) for layer, experts in found["layers"].items()}, found["tensors"]),
    )


def _numbers_of_experts(found: Mapping[str, Any]) -> dict[str, str]:
    """What a version has more or fewer, of those that have."""
    added = [
        f"{layer}:{expert} beside {beside}"
        for layer, experts in found["added"].items()
        for expert, beside in experts.items()
    ]
    retired = [f"{layer}:{expert}" for layer, experts in found["retired"].items() for expert in experts]
    rows = {"experts added": ", ".join(added), "experts retired": ", ".join(retired)}
    return {title: text for title, text in rows.items() if text}


def diff_view(found: Mapping[str, Any]) -> Group:
    """`difference` for a terminal."""
    metrics = {
        f"metric {name}": f"{_number(before)} → {_number(now)}"
        for name, (before, now) in found["metrics"].items()
    }
    against = found["against"] or "(the base checkpoint)"
    head = _grid({"version": found["version"], "against": against, **metrics})
    return Group(head, _changes(found["layers"], found["tensors"]))


def _changes(layers: Mapping[int, list[int]], tensors: Any) -> Table:
    table = Table("layer", "experts that differ")
    for layer, experts in layers.items():
        table.add_row(str(layer), ", ".join(map(str, experts)))
    for name in tensors:
        table.add_row("", name)
    if not table.row_count:
        table.add_row("", "nothing")
    return table


def _grid(rows: Mapping[str, str]) -> Table:
    head = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        head.add_row(name, value)
    return head


def _when(created: float) -> str:
    return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M:%S") if created else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
