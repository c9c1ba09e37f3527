"""The configuration and the placement plan as tables for the terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from pydantic import ByteSize, SecretStr
from rich.table import Table

from cluster.config import LoadedConfig, leaves
from cluster.config_sources import dotted
from cluster.messages import HostSlot, NodeInfo
from cluster.placement import Plan

_MASK: Final = "********"
# Extra options of the engine and of the store have no schema to say which of them are secret.
_SECRET_OPTION: Final = re.compile(
    r"^(engine|versions)\.options\.(.*[._-])?(token|key|secret|password)$", re.IGNORECASE
)


def config_table(loaded: LoadedConfig) -> Table:
    """Every key with its value and where that came from; secrets are masked, defaults dimmed."""
    table = Table("Key", "Value", "From", box=None, header_style="bold")
    for path, value in leaves(loaded.config):
        key = dotted(path)
        origin = loaded.origins[key]
        shown = show_value(_masked(value, key))
        table.add_row(
            key, _plain(shown), _plain(str(origin)), style="dim" if origin.kind == "default" else ""
        )
    return table


def plan_table(plan: Plan, slots: Sequence[HostSlot], nodes: Sequence[NodeInfo]) -> Table:
    """The hosts with their nodes, experts per layer, and the memory these take of what the host may hold."""
    hostnames = {node.node_id: node.hostname for node in nodes}
    sizes, totals = plan.bytes_by_host, plan.experts_by_host
    table = Table("Host", "Node", "Device", "Experts per layer", box=None, header_style="bold")
    for name in ("Threads", "Experts", "Memory", "Limit", "Used"):
        table.add_column(name, justify="right")
    for slot in slots:
        used = sizes[slot.host_id]
        table.add_row(
            slot.host_id,
            _plain(hostnames.get(slot.node_id) or slot.node_id[:8]),
            _device(slot),
            _ranges(plan, slot.host_id),
            str(slot.threads),
            str(totals[slot.host_id]),
            show_size(used),
            show_size(slot.memory_bytes),
            f"{used / slot.memory_bytes:.0%}" if slot.memory_bytes else "",
        )
    total = sum(sizes.values())
    limit = sum(slot.memory_bytes for slot in slots)
    used_share = f"{total / limit:.0%}" if limit else ""
    table.add_section()
    table.add_row(
        "all",
        "",
        "",
        _copies(plan),
        "",
        str(sum(totals.values())),
        show_size(total),
        show_size(limit),
        used_share,
    )
    return table


def plan_json(plan: Plan, slots: Sequence[HostSlot], nodes: Sequence[NodeInfo]) -> dict[str, Any]:
    """The same for a program; `bytes` of weights and of what the host may hold."""
    hostnames, sizes = {node.node_id: node.hostname for node in nodes}, plan.bytes_by_host
    return {
        "hosts": {
            slot.host_id: {
                "node": hostnames.get(slot.node_id) or slot.node_id,
                "device": slot.device,
                "gpus": float(slot.gpus),
                "threads": slot.threads,
                "bytes": sizes[slot.host_id],
                "limit_bytes": slot.memory_bytes,
                "experts": {layer: list(held) for layer, held in plan.assignments[slot.host_id].items()},
            }
            for slot in slots
        }
    }


def show_value(value: object) -> str:
    """A configuration value as its YAML would have it, with units; secrets masked."""
    if isinstance(value, SecretStr):
        return _MASK
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(show_value, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, ByteSize):
        return show_size(value).replace(" ", "")
    if isinstance(value, float):
        return show_duration(value)
    return str(value)


def show_size(size: int) -> str:
    """Bytes in the largest binary unit that leaves one or more: ``1 GiB``, ``1.5 MiB``."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{round(size / unit, 2):g} {name}"
    return f"{size} B"


def show_duration(seconds: float) -> str:
    """Seconds in the unit that leaves a readable number: ``30s``, ``500ms``, ``20us``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit or seconds == 0:
            return f"{seconds / unit:g}{name}"
    return f"{seconds / 1e-6:g}us"


def _masked(value: object, key: str) -> object:
    """The same, but for what is secret inside a nested option."""
    if not isinstance(value, dict):
        return _MASK if _SECRET_OPTION.match(key) else value
    return {name: _masked(inner, f"{key}.{name}") for name, inner in value.items()}


def _device(slot: HostSlot) -> str:
    """Such as ``cpu``, ``cuda``, or ``0.4 cuda``."""
    return slot.device if slot.gpus in (0, 1) else f"{slot.gpus:f} {slot.device}"


def _ranges(plan: Plan, host_id: str) -> str:
    return ", ".join(f"{count} in {_span(first, last)}" for first, last, count in plan.layer_ranges(host_id))


def _copies(plan: Plan) -> str:
    """``2 copies``, or where experts differ ``2 copies of 6, 3 of 2 in 0-2; ...``; nothing for one of each."""
    least, most = plan.copies_range
    if least == most:
        return f"{most} copies" if most > 1 else ""
    runs: list[tuple[int, int, str]] = []
    for layer in plan.layers:
        (fewest, first), *more = sorted(Counter(plan.copies[layer.index]).items())
        shown = f"{fewest} {'copy' if fewest == 1 else 'copies'} of {first}"
        shown += "".join(f", {copies} of {experts}" for copies, experts in more)
        start = runs.pop()[0] if runs and runs[-1][2] == shown else layer.index
        runs.append((start, layer.index, shown))
    return "; ".join(f"{shown} in {_span(first, last)}" for first, last, shown in runs)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"


def _plain(text: str) -> str:
    # Rich reads [..] as markup; a list of API keys would vanish.
    return text.replace("[", "\\[")
