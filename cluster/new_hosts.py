"""Hosts that join a mesh that serves: their specifications, and the nodes that have room for them; pure functions."""

from __future__ import annotations

from dataclasses import replace

from cluster.changes import Snapshot
from cluster.config import HostGroup
from cluster.inventory import join, matches
from cluster.messages import HostSpec, NodeInfo
from cluster.rehome import moved
from cluster.repair_state import HostState


def new_hosts(snapshot: Snapshot, group: str, number: int) -> list[HostSpec]:
    """So many more hosts of a group, which hold nothing yet. PlacementError if not all find room."""
    coming = []
    for _ in range(number):
        spec = _new_host(snapshot, group)
        snapshot = with_host(snapshot, spec)
        coming.append(spec)
    return coming


def with_host(snapshot: Snapshot, spec: HostSpec) -> Snapshot:
    """As it will be when this host has joined."""
    deployment = replace(snapshot.deployment, hosts=(*snapshot.deployment.hosts, spec))
    return replace(
        snapshot, deployment=deployment, hosts={**snapshot.hosts, spec.host_id: HostState(spec.node_id)}
    )


def may_have(group: HostGroup, node: NodeInfo) -> bool:
    """Whether a node is one for hosts of this group at all."""
    needed = 1 if group.threads == "auto" else group.threads
    able = node.gpus >= 1 if group.device == "cuda" else node.cpus >= needed
    return able and matches(group.selector, node.labels)


def _new_host(snapshot: Snapshot, group: str) -> HostSpec:
    deployment = snapshot.deployment
    wanted = deployment.group(group)
    members = [spec for spec in deployment.hosts if spec.group == group]
    number = 1 + max((int(spec.host_id.rpartition("-")[2]) for spec in members), default=-1)
    placed = [(deployment.group(s.group), snapshot.hosts[s.host_id].node_id) for s in deployment.hosts]
    nodes = [node for node in snapshot.nodes if node.node_id not in deployment.limits.drained]
    slot = join(
        wanted,
        f"{group}-{number}",
        placed,
        nodes,
        reserved_memory=deployment.limits.reserved_bytes,
        reserved_gpus=deployment.limits.reserved_gpus,
    )
    like = members[0] if members else deployment.hosts[0]
    node = next(node for node in nodes if node.node_id == slot.node_id)
    spec = replace(
        like,
        host_id=slot.host_id,
        group=group,
        device=wanted.device,
        kernel=wanted.kernel,
        experts={},
        variants={},
        unix=f"expertmesh-{deployment.run}-{slot.host_id}",
        tcp_port=0,
        memory_limit_bytes=wanted.memory_limit or 0,
        gpus=wanted.gpu_share,
    )
    # On another node than the one it is like, only TCP leads there.
    return replace(moved(spec, node), threads=slot.threads)
