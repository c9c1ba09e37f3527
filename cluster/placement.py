"""Which expert goes to which host: a pure function of layers, hosts and settings.

A layer takes as long as its slowest host, so every layer is divided over all hosts in proportion to their
speed. Memory is a limit, not a wish: a host that is full leaves its share to the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.apportion import apportion, spread_rounds
from cluster.config import PlacementConfig
from cluster.errors import PlacementError
from cluster.messages import HostSlot, MoeLayer

# Experts are bound by how fast weights are read. A GPU reads its memory at 1 to 5 TB/s, a core its share of
# the socket's at about 10 GB/s: a GPU counts as this many cores.
_GPU_SPEED: Final = 128
_GIB: Final = 2**30


@dataclass(frozen=True)
class Plan:
    """Which experts each host is to hold."""

    layers: tuple[MoeLayer, ...]
    replicas: int
    item_bytes: int
    """Bytes of one parameter, as the hosts hold it."""
    assignments: Mapping[str, Mapping[int, tuple[int, ...]]]
    """Host id → layer index → experts, ascending. Every host is named, those of a node side by side, and a
    layer only where the host has experts of it."""

    @property
    def bytes_by_host(self) -> dict[str, int]:
        """Bytes of expert weights per host."""
        size = {layer.index: layer.expert_parameters * self.item_bytes for layer in self.layers}
        return {
            host_id: sum(len(experts) * size[layer] for layer, experts in held.items())
            for host_id, held in self.assignments.items()
        }

    @property
    def experts_by_host(self) -> dict[str, int]:
        """Number of experts per host, all layers together."""
        return {host_id: sum(map(len, held.values())) for host_id, held in self.assignments.items()}

    def layer_ranges(self, host_id: str) -> list[tuple[int, int, int]]:
        """What a host holds, short enough to show: runs of layers (first, last) with as many experts each."""
        runs: list[tuple[int, int, int]] = []
        held = self.assignments[host_id]
        for layer in self.layers:
            count = len(held.get(layer.index, ()))
            if runs and runs[-1][2] == count:
                runs[-1] = (runs[-1][0], layer.index, count)
            else:
                runs.append((layer.index, layer.index, count))
        return runs


def plan(
    layers: Sequence[MoeLayer], slots: Sequence[HostSlot], settings: PlacementConfig, *, item_bytes: int
) -> Plan:
    """Place ``settings.replicas`` copies of every expert on distinct hosts, with ``spread: node`` on distinct
    nodes where there are enough of them.

    The same input gives the same plan. Equal hosts hold equally many experts of every layer, give or take one
    (several copies spread over nodes with unequal numbers of hosts: over the hosts of each node). Raises
    PlacementError, with the GiB that are missing in all and at which host, if the experts don't fit.
    """
    copies = settings.replicas
    if len(slots) < copies:
        raise PlacementError(
            f"{copies} copies of each expert need {copies} hosts, there are {len(slots)}",
            "raise a host group's count, or lower placement.replicas",
        )
    by_node: dict[str, list[HostSlot]] = defaultdict(list)
    for slot in slots:
        by_node[slot.node_id].append(slot)
    nodes = list(by_node.values())
    # Hosts of one node side by side: see _experts.
    hosts = [slot for node in nodes for slot in node]
    per_expert = {layer.index: layer.expert_parameters * item_bytes for layer in layers}
    one_copy = sum(layer.num_experts * per_expert[layer.index] for layer in layers)
    speeds = [_GPU_SPEED if slot.device == "cuda" else slot.threads for slot in hosts]
    limits = [min(slot.memory_bytes, one_copy) for slot in hosts]
    if sum(limits) < copies * one_copy:
        raise _too_small(hosts, speeds, copies, one_copy, copies * one_copy - sum(limits))
    targets = apportion(copies * one_copy, speeds, limits)

    free = [slot.memory_bytes for slot in hosts]
    counts: dict[int, list[int]] = {}
    for size in sorted(set(per_expert.values()), reverse=True):
        alike = [layer for layer in layers if per_expert[layer.index] == size]
        units = sum(layer.num_experts for layer in alike)
        caps = [min(units, left // size) for left in free]
        if sum(caps) < copies * units:
            raise _too_small(hosts, speeds, copies, one_copy, (copies * units - sum(caps)) * size)
        sizes = [layer.num_experts for layer in alike]
        widths = [len(node) for node in nodes] if copies > 1 and settings.spread == "node" else []
        table = _divide(sizes, copies, targets, caps, widths)
        counts.update((layer.index, row) for layer, row in zip(alike, table, strict=True))
        free = [left - size * sum(row[i] for row in table) for i, left in enumerate(free)]

    held: dict[str, dict[int, tuple[int, ...]]] = {slot.host_id: {} for slot in hosts}
    for layer in layers:
        for slot, experts in zip(hosts, _experts(layer.num_experts, counts[layer.index]), strict=True):
            if experts:
                held[slot.host_id][layer.index] = experts
    return Plan(tuple(layers), copies, item_bytes, held)


def _divide(
    sizes: Sequence[int], copies: int, weights: Sequence[int], caps: Sequence[int], widths: Sequence[int]
) -> list[list[int]]:
    """Experts per layer and host, for layers of ``sizes`` experts that are all equally large.

    ``widths`` gives the number of hosts on each node, if no node should hold an expert twice; where the other
    nodes are too small for that, it is given up.
    """
    units = sum(sizes)
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    parts = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
    node_caps = [min(units, sum(caps[part])) for part in parts]
    if not widths or sum(node_caps) < copies * units:
        return spread_rounds(sizes, apportion(copies * units, weights, caps))
    totals = apportion(copies * units, [sum(weights[part]) for part in parts], node_caps)
    per_node = spread_rounds(sizes, totals)
    table: list[list[int]] = [[] for _ in sizes]
    for index, (part, total) in enumerate(zip(parts, totals, strict=True)):
        inside = spread_rounds([row[index] for row in per_node], apportion(total, weights[part], caps[part]))
        for row, share in zip(table, inside, strict=True):
            row.extend(share)
    return table


def _experts(num_experts: int, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Which experts each host holds: consecutive ones, wrapping round (McNaughton's rule).

    Copies of an expert are ``num_experts`` positions apart, so neither a host, nor the hosts of a node side
    by side, hold one twice as long as together they hold at most ``num_experts``.
    """
    held, start = [], 0
    for count in counts:
        held.append(tuple(sorted((start + i) % num_experts for i in range(count))))
        start += count
    return held


def _too_small(
    hosts: Sequence[HostSlot], speeds: Sequence[int], copies: int, one_copy: int, short: int
) -> PlacementError:
    shares = apportion(copies * one_copy, speeds, [one_copy] * len(hosts))
    lines = [
        f"{slot.host_id} may hold {_gib(slot.memory_bytes)}, its share is {_gib(share)}: "
        f"{_gib(share - slot.memory_bytes)} short"
        for slot, share in zip(hosts, shares, strict=True)
        if share > slot.memory_bytes
    ]
    each = f" ({copies} copies of {_gib(one_copy)})" if copies > 1 else ""
    return PlacementError(
        f"the experts take {_gib(copies * one_copy)}{each}, the hosts have room for all but {_gib(short)}"
        + "".join(f"\n  {line}" for line in lines),
        "raise the memory of the host groups, add hosts or nodes"
        + (", or lower placement.replicas" if copies > 1 else ", or serve in a smaller dtype"),
    )


def _gib(size: int) -> str:
    # Small models would show as 0.0 GiB throughout.
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"
