"""Which hosts are where they should not stay, and which nodes are free for a group: pure functions.

Where an operator brings a node for every host, a node is free for a group if it has none of the group's hosts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from cluster.changes import Snapshot
from cluster.config import HostGroup
from cluster.deployment import Deployment
from cluster.messages import HostSpec, NodeInfo
from cluster.new_hosts import may_have, new_hosts, with_host


def staying(snapshot: Snapshot, group: str) -> list[str]:
    """Ids of the group's hosts that do not leave, in the order in which they came."""
    deployment = snapshot.deployment
    return [s.host_id for s in deployment.hosts if s.group == group and s.host_id not in deployment.leaving]


def settled_hosts(snapshot: Snapshot, group: str) -> list[str]:
    """Those of them that are on no node that is being evacuated."""
    going = snapshot.deployment.evacuated
    return [host for host in staying(snapshot, group) if snapshot.hosts[host].node_id not in going]


def on_evacuated(snapshot: Snapshot) -> list[str]:
    """Hosts on nodes that are being evacuated, which were not told to leave yet."""
    deployment = snapshot.deployment
    return [
        spec.host_id
        for spec in deployment.hosts
        if spec.host_id not in deployment.leaving
        and snapshot.hosts[spec.host_id].node_id in deployment.evacuated
    ]


def doubled(snapshot: Snapshot, group: str) -> list[str]:
    """Hosts that share a node with an earlier one of their group, as after the loss of a node."""
    seen: set[str] = set()
    found = []
    for host in settled_hosts(snapshot, group):
        node_id = snapshot.hosts[host].node_id
        if node_id in seen:
            found.append(host)
        seen.add(node_id)
    return found


def free_nodes(snapshot: Snapshot, group: HostGroup) -> tuple[NodeInfo, ...]:
    """Nodes for the group's hosts that have none and are not drained."""
    mine = {snapshot.hosts[s.host_id].node_id for s in snapshot.deployment.hosts if s.group == group.name}
    held = mine.union(snapshot.deployment.limits.drained)
    return tuple(node for node in snapshot.nodes if node.node_id not in held and may_have(group, node))


def hosts_on_free_nodes(snapshot: Snapshot, group: HostGroup, number: int) -> list[HostSpec]:
    """Up to so many more hosts, each on a free node of its own. PlacementError if one has too little room."""
    coming = []
    for node in free_nodes(snapshot, group)[: max(0, number)]:
        (spec,) = new_hosts(replace(snapshot, nodes=(node,)), group.name, 1)
        snapshot = with_host(snapshot, spec)
        coming.append(spec)
    return coming


def evacuating(deployment: Deployment, node_id: str, reason: str, wanted: Mapping[str, int]) -> Deployment:
    """With a node that hosts are to leave, and groups that are to have so many hosts elsewhere then."""
    wishes = {**deployment.wishes}
    for group, count in wanted.items():
        wishes[group] = max(count, wishes.get(group, 0))
    limits = deployment.limits
    drained = tuple(dict.fromkeys((*limits.drained, node_id)))
    return replace(
        deployment,
        limits=replace(limits, drained=drained),
        evacuated={**deployment.evacuated, node_id: reason},
        wishes=wishes,
    )


def not_evacuating(deployment: Deployment, node_ids: Collection[str]) -> Deployment:
    """With nodes that may have hosts again, or are gone."""
    limits = deployment.limits
    drained = tuple(node for node in limits.drained if node not in node_ids)
    evacuated = {node: why for node, why in deployment.evacuated.items() if node not in node_ids}
    return replace(deployment, limits=replace(limits, drained=drained), evacuated=evacuated)


def wishing(deployment: Deployment, group: str, count: int | None) -> Deployment:
    """With a group that is to have so many hosts as soon as there are nodes, or with as many as it has."""
    wishes = {name: wish for name, wish in deployment.wishes.items() if name != group}
    return replace(deployment, wishes=wishes if count is None else {**wishes, group: count})
