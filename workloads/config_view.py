"""The configuration and the placement plan as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from pydantic import ByteSize, SecretStr
from rich.table import Table

from cluster.config import LoadedConfig, leaves
from cluster.config_sources import dotted
from cluster.messages import HostSlot, NodeInfo
from cluster.placement import Plan

_MASK: Final = "********"
# Extra engine options have no schema to say which of them are secret.
_SECRET_OPTION: Final = re.compile(r"^engine\.options\.(.*[._-])?(token|key|secret|password)$", re.IGNORECASE)


def config_table(loaded: LoadedConfig) -> Table:
    """Every key with its value and where that came from; secrets are masked, defaults dimmed."""
    table = Table("Key", "Value", "From", box=None, header_style="bold")
    for path, value in leaves(loaded.config):
        key = dotted(path)
        origin = loaded.origins[key]
        shown = _MASK if _SECRET_OPTION.match(key) else show_value(value)
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
            slot.device,
            _ranges(plan, slot.host_id),
            str(slot.threads),
            str(totals[slot.host_id]),
            show_size(used),
            show_size(slot.memory_bytes),
            f"{used / slot.memory_bytes:.0%}" if slot.memory_bytes else "",
        )
    total = sum(sizes.values())
    limit = sum(slot.memory_bytes for slot in slots)
    copies = f"{plan.replicas} copies" if plan.replicas > 1 else ""
    used_share = f"{total / limit:.0%}" if limit else ""
    table.add_section()
    table.add_row(
        "all", "", "", copies, "", str(sum(totals.values())), show_size(total), show_size(limit), used_share
    )
    return table


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


def _ranges(plan: Plan, host_id: str) -> str:
    runs = plan.layer_ranges(host_id)
    return ", ".join(
        f"{count} in {first}-{last}" if last > first else f"{count} in {first}" for first, last, count in runs
    )


def _plain(text: str) -> str:
    # Rich reads [..] as markup; a list of API keys would vanish.
    return text.replace("[", "\\[")
