"""Which expert goes to which host: a pure function of layers, hosts and settings.

A layer takes as long as its slowest host, so every layer is divided over all hosts in proportion to their
speed. Memory is a limit, not a wish: a host that is full leaves its share to the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.apportion import apportion
from cluster.config_placement import PlacementConfig
from cluster.deal import apportion_copies
from cluster.errors import PlacementError
from cluster.even_copies import even_copies
from cluster.messages import HostSlot, MoeLayer, NodeInfo
from cluster.replication import RoutingCounts, copies_per_expert
from cluster.spread_copies import spread_copies

# Experts are bound by how fast weights are read. A GPU reads its memory at 1 to 5 TB/s, a core its share of
# the socket's at about 10 GB/s: a GPU counts as this many cores.
_GPU_SPEED: Final = 128
_GIB: Final = 2**30


@dataclass(frozen=True)
class Plan:
    """Which experts each host is to hold."""

    layers: tuple[MoeLayer, ...]
    copies: Mapping[int, tuple[int, ...]]
    """Layer index → number of copies of each expert."""
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

    @property
    def copies_range(self) -> tuple[int, int]:
        """Fewest and most copies that an expert has."""
        return _range(self.copies)

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
    layers: Sequence[MoeLayer],
    slots: Sequence[HostSlot],
    settings: PlacementConfig,
    *,
    item_bytes: int,
    counts: RoutingCounts | None = None,
    nodes: Sequence[NodeInfo] = (),
) -> Plan:
    """Place the copies that ``settings.replicas`` asks for, those of an expert on distinct hosts, with
    ``spread: node`` on distinct nodes where there are enough of them.

    ``counts`` says how often each expert was chosen, for rules that ask, and ``nodes`` what labels the slots' nodes
    have, for pins. The same input gives the same plan.
    Equal hosts hold equally many experts of every layer, give or take one (several copies spread over nodes
    with unequal numbers of hosts: over the hosts of each node; unequal numbers of copies: a few). Raises
    PlacementError, with the GiB that are missing in all and at which host, if the experts don't fit, and
    ConfigError for rules or counts of other layers.
    """
    copies = copies_per_expert(layers, settings.rules, counts or {})
    least, most = _range(copies)
    if len(slots) < most:
        raise PlacementError(
            f"{most} copies of {'each' if least == most else 'an'} expert need {most} hosts, "
            f"there are {len(slots)}",
            "raise a host group's count, or lower placement.replicas",
        )
    if settings.pins:
        from cluster.pinned_placement import pinned  # NumPy, which the rest of this does not need

        found = pinned(
            layers,
            slots,
            [_speed(slot) for slot in slots],
            settings,
            nodes,
            copies,
            item_bytes=item_bytes,
            counts=counts or {},
        )
        return Plan(tuple(layers), copies, item_bytes, found)
    by_node: dict[str, list[HostSlot]] = defaultdict(list)
    for slot in slots:
        by_node[slot.node_id].append(slot)
    groups = list(by_node.values())
    # Hosts of one node side by side: what divides the experts counts on it.
    hosts = [slot for group in groups for slot in group]
    widths = [len(group) for group in groups] if settings.spread == "node" else [len(hosts)]
    per_expert = {layer.index: layer.expert_parameters * item_bytes for layer in layers}
    one_copy = sum(layer.num_experts * per_expert[layer.index] for layer in layers)
    total = sum(sum(copies[layer.index]) * per_expert[layer.index] for layer in layers)
    speeds = [_speed(slot) for slot in hosts]
    limits = [min(slot.memory_bytes, one_copy) for slot in hosts]
    if sum(limits) < total:
        raise _too_small(hosts, speeds, (least, most), one_copy, total, total - sum(limits))
    targets = apportion(total, speeds, limits)

    free = [slot.memory_bytes for slot in hosts]
    held: dict[str, dict[int, tuple[int, ...]]] = {slot.host_id: {} for slot in hosts}
    for size in sorted(set(per_expert.values()), reverse=True):
        alike = [layer.index for layer in layers if per_expert[layer.index] == size]
        rows = [copies[index] for index in alike]
        caps = [min(sum(map(len, rows)), left // size) for left in free]
        placed = _place(rows, targets, caps, widths)
        if placed is None:
            flat = [copy for row in rows for copy in row]
            missing = sum(flat) - sum(apportion_copies(flat, targets, caps))
            raise _too_small(hosts, speeds, (least, most), one_copy, total, missing * size)
        for position, slot in enumerate(hosts):
            mine = {index: row[position] for index, row in zip(alike, placed, strict=True) if row[position]}
            held[slot.host_id].update(mine)
            free[position] -= size * sum(map(len, mine.values()))
    in_order = {
        host_id: {layer.index: mine[layer.index] for layer in layers if layer.index in mine}
        for host_id, mine in held.items()
    }
    return Plan(tuple(layers), copies, item_bytes, in_order)


def _speed(slot: HostSlot) -> int:
    return max(1, int(_GPU_SPEED * slot.gpus)) if slot.gpus else slot.threads


def _place(
    copies: Sequence[Sequence[int]], weights: Sequence[int], caps: Sequence[int], widths: Sequence[int]
) -> Sequence[Sequence[tuple[int, ...]]] | None:
    """Per layer and host the experts that it holds, all equally large; None if there is no room for them.

    ``copies[layer][expert]`` are wanted; ``widths`` gives the number of hosts on each node, those of a node
    side by side.
    """
    numbers = {copy for row in copies for copy in row}
    if len(numbers) == 1:
        even = even_copies(list(map(len, copies)), numbers.pop(), weights, caps, widths)
        # Several nodes, but too few or too small ones for each to hold an expert once.
        if even is not None or len(widths) == 1:
            return even
    holders = spread_copies(copies, weights, caps, widths)
    return holders and [
        [tuple(expert for expert, chosen in enumerate(row) if host in chosen) for host in range(len(caps))]
        for row in holders
    ]


def _range(copies: Mapping[int, Sequence[int]]) -> tuple[int, int]:
    numbers = {copy for row in copies.values() for copy in row} or {1}
    return min(numbers), max(numbers)


def _too_small(
    hosts: Sequence[HostSlot],
    speeds: Sequence[int],
    copies: tuple[int, int],
    one_copy: int,
    total: int,
    short: int,
) -> PlacementError:
    shares = apportion(total, speeds, [one_copy] * len(hosts))
    lines = [
        f"{slot.host_id} may hold {_gib(slot.memory_bytes)}, its share is {_gib(share)}: "
        f"{_gib(share - slot.memory_bytes)} short"
        for slot, share in zip(hosts, shares, strict=True)
        if share > slot.memory_bytes
    ]
    least, most = copies
    numbers = f"{least} to {most}" if least < most else f"{most}"
    each = f" ({numbers} copies of {_gib(one_copy)})" if most > 1 else ""
    return PlacementError(
        f"the experts take {_gib(total)}{each}, the hosts have room for all but {_gib(short)}"
        + "".join(f"\n  {line}" for line in lines),
        "raise the memory of the host groups, add hosts or nodes"
        + (", or lower placement.replicas" if most > 1 else ", or serve in a smaller dtype"),
    )


def _gib(size: int) -> str:
    # Small models would show as 0.0 GiB throughout.
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"
