"""A first placement that heeds pins: the planner's, since dividing evenly cannot. Nothing was measured yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.config_placement import PlacementConfig
from cluster.fleet import FleetHost, PlanSettings, layer_load
from cluster.holdings import by_host
from cluster.messages import HostCost, HostSlot, MoeLayer, NodeInfo
from cluster.pins import pins
from cluster.replication import RoutingCounts

_ROWS_PER_STEP = 64.0


def pinned(
    layers: Sequence[MoeLayer],
    slots: Sequence[HostSlot],
    speeds: Sequence[int],
    settings: PlacementConfig,
    nodes: Sequence[NodeInfo],
    copies: Mapping[int, tuple[int, ...]],
    *,
    item_bytes: int,
    counts: RoutingCounts,
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Host id → layer → experts, with `copies` of each; `speeds` of the slots, in any unit.

    Raises PlacementError if pins, memory and copies can't all be, ConfigError for pins of other layers or experts.
    """
    from cluster.planner import plan  # compiled code: a second to load

    labels = {node.node_id: node.labels for node in nodes}
    hosts = [
        FleetHost(
            slot.host_id,
            slot.memory_bytes,
            HostCost(0.0, 1e-3 / speed, 1e-5 / speed),
            slot.group,
            slot.node_id,
            device=slot.device,
            labels=labels.get(slot.node_id, {}),
        )
        for slot, speed in zip(slots, speeds, strict=True)
    ]
    loads = [
        layer_load(
            layer.index,
            layer.expert_parameters * item_bytes,
            np.array([counts.get(layer.index, (1,) * layer.num_experts)], np.float64),
            _ROWS_PER_STEP,
        )
        for layer in layers
    ]
    number = sum(layer.num_experts for layer in layers)
    wish = PlanSettings(
        redundancy=sum(map(sum, copies.values())) / max(1, number),
        least=copies,
        spread=settings.spread,
        apart=len({slot.node_id for slot in slots}) if settings.spread == "node" else None,
        pins=pins(settings.pins, layers),
    )
    found = plan(hosts, loads, None, wish)
    held = by_host(
        {
            layer.layer: [[found.hosts[position] for position in hosts_of] for hosts_of in layer.holders]
            for layer in found.layers
        }
    )
    return {slot.host_id: held.get(slot.host_id, {}) for slot in slots}
