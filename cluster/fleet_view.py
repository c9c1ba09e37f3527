"""From what a controller knows to what the planner takes, and from a plan to a proposal: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from cluster.changes import Snapshot
from cluster.deployment import Deployment
from cluster.fleet import FleetHost, LayerLoad, PlanSettings, layer_load
from cluster.inventory import weight_limits
from cluster.messages import HostCost
from cluster.moves import Move, Proposal, new_and_old, pairs
from cluster.pins import misplaced, pins
from cluster.repair_state import Phase
from cluster.routing_windows import scenarios
from cluster.table import PlacementTable, in_turn
from cluster.traffic import TrafficStatistics

# Labels that say in which zone a node is, the first that it has.
_ZONES: Final = ("zone", "topology.kubernetes.io/zone", "ray.io/availability-zone")
_UNMEASURED: Final = HostCost(0.0, 1e-4, 1e-6)


def settled(snapshot: Snapshot) -> bool:
    """Whether every host is ready, or gone with no room to come back: a plan would count on the others in vain."""
    return all(host.phase in (Phase.READY, Phase.NO_ROOM) for host in snapshot.hosts.values())


def fleet(snapshot: Snapshot, costs: Mapping[str, HostCost]) -> list[FleetHost]:
    """The hosts as the planner sees them; those that leave, or wait for room, with memory for nothing."""
    deployment = snapshot.deployment
    placed = [(deployment.group(s.group), snapshot.hosts[s.host_id].node_id) for s in deployment.hosts]
    limits = weight_limits(
        placed,
        snapshot.nodes,
        reserved_memory=deployment.limits.reserved_bytes,
        reserved_gpus=deployment.limits.reserved_gpus,
    )
    nodes = {node.node_id: node for node in snapshot.nodes}
    # One that was not measured is taken to be like the others of its group, else like any.
    by_group = {spec.group: costs[spec.host_id] for spec in deployment.hosts if spec.host_id in costs}
    any_cost = next(iter(costs.values()), _UNMEASURED)
    hosts = []
    for spec, limit in zip(deployment.hosts, limits, strict=True):
        known = snapshot.hosts[spec.host_id]
        node = nodes.get(known.node_id)
        labels = dict(node.labels) if node is not None else {}
        usable = spec.host_id not in deployment.leaving and known.phase is not Phase.NO_ROOM
        hosts.append(
            FleetHost(
                spec.host_id,
                limit if usable else 0,
                costs.get(spec.host_id, by_group.get(spec.group, any_cost)),
                spec.group,
                known.node_id,
                next((labels[name] for name in _ZONES if name in labels), ""),
                spec.device,
                labels,
            )
        )
    return hosts


def layer_loads(deployment: Deployment, statistics: TrafficStatistics) -> list[LayerLoad]:
    """What the layers are asked for; evenly, as long as nothing was counted."""
    shares = scenarios(statistics.counts())
    return [
        layer_load(
            layer.index,
            layer.expert_parameters * deployment.item_bytes,
            shares[:, row, : layer.num_experts],
            statistics.rows_per_step,
        )
        for row, layer in enumerate(deployment.layers)
    ]


def plan_settings(deployment: Deployment, hosts: Sequence[FleetHost]) -> PlanSettings:
    """What the configuration asks of a plan of these hosts."""
    config, copies = deployment.placement, deployment.copies
    number = sum(layer.num_experts for layer in deployment.layers)
    mean = sum(map(sum, copies.values())) / max(1, number)
    return PlanSettings(
        redundancy=max(mean, config.redundancy),
        least=copies,
        spread=config.spread,
        # On distinct nodes as far as there are nodes.
        apart=len({host.node for host in hosts if host.memory_bytes > 0})
        if config.spread == "node"
        else None,
        pins=pins(config.pins, deployment.layers),
        max_moves=config.rebalance.max_moves,
        gain_per_move=_GAIN_PER_MOVE,
    )


# Of the layer's time: less is noise, and each move costs reading a blob.
_GAIN_PER_MOVE: Final = 5e-4


def proposal(
    deployment: Deployment,
    hosts: Sequence[FleetHost],
    loads: Sequence[LayerLoad],
    settings: PlanSettings,
    *,
    must: bool,
    explain: bool,
) -> Proposal:
    """Plan, and say whether that is worth it: it must save `placement.rebalance.min_gain`, or with `must` anything.

    Raises PlacementError if no placement is possible.
    """
    from cluster.planner import plan  # compiled code: a second to load, and only where plans are made

    table = PlacementTable.from_json(deployment.table)
    found = plan(hosts, loads, table.experts, settings)
    names = found.hosts
    speeds = [_speed(host.cost) if host.memory_bytes > 0 else 1 for host in hosts]
    experts = {
        layer.layer: in_turn(table.experts[layer.layer], layer.holders, names, speeds)
        for layer in found.layers
    }
    new, old = new_and_old(table.experts, experts)
    now, then = found.seconds_before, found.seconds
    emptied = {host.host_id for host in hosts if host.memory_bytes == 0}
    needed = any(emptied.intersection(holders) for rows in table.experts.values() for holders in rows)
    gain = 1 - then / now if now > 0 else 0.0
    least = 0.0 if must else float(deployment.placement.rebalance.min_gain)
    if not new and not old:
        verdict, worthwhile = "nothing would change", False
    elif needed:
        verdict, worthwhile = "hosts are to be emptied", True
    elif misplaced(settings.pins, hosts, table.experts):
        verdict, worthwhile = "pinned experts are elsewhere", True
    elif gain > least:
        verdict, worthwhile = f"saves {gain:.1%} of the experts' time", True
    else:
        verdict, worthwhile = f"saves {gain:.1%} of the experts' time, {least:.1%} would be worth it", False
    moves = _moves(hosts, loads, table.experts, experts) if explain else ()
    return Proposal(experts, now, then, new, old, moves, verdict, worthwhile)


def _speed(cost: HostCost) -> int:
    """Experts a second, as a whole number."""
    return max(1, round(1 / max(cost.seconds(1.0, 1.0), 1e-9)))


def _moves(
    hosts: Sequence[FleetHost],
    loads: Sequence[LayerLoad],
    before: Mapping[int, Sequence[Sequence[str]]],
    after: Mapping[int, Sequence[Sequence[str]]],
) -> tuple[Move, ...]:
    """Every move with what it gains: the layer's time without it, less the time with all of them."""
    position = {host.host_id: index for index, host in enumerate(hosts)}
    moves = []
    for load in loads:
        rows = after[load.layer]
        whole = _layer_seconds(hosts, load, rows, position)
        for expert, holders in enumerate(rows):
            for to, instead_of in pairs(before[load.layer][expert], holders):
                kept = [instead_of if host == to else host for host in holders if host != to or instead_of]
                without = [*rows[:expert], tuple(kept) or (to,), *rows[expert + 1 :]]
                gain = _layer_seconds(hosts, load, without, position) - whole
                moves.append(Move(load.layer, expert, to, instead_of, gain))
    return tuple(sorted(moves, key=lambda move: -move.gain_s))


def _layer_seconds(
    hosts: Sequence[FleetHost], load: LayerLoad, rows: Sequence[Sequence[str]], position: Mapping[str, int]
) -> float:
    from cluster.placement_time import step_seconds

    known = [[position[host] for host in holders if host in position] for holders in rows]
    holders = np.full((len(known), max(1, max(map(len, known)))), -1, np.int32)
    for expert, held in enumerate(known):
        holders[expert, : len(held)] = held
    copies = np.array([len(held) for held in known], np.int32)
    return float(
        step_seconds(
            holders,
            copies,
            load.touch,
            load.rows,
            np.array([host.cost.fixed_s for host in hosts]),
            np.array([host.cost.per_expert_s for host in hosts]),
            np.array([host.cost.per_row_s for host in hosts]),
        )
    )
