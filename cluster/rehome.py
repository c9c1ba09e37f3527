"""Where a host goes whose node is gone: a pure function of the living nodes and of what lies on them.

Unlike `cluster.inventory`, which lays out a whole deployment, this moves one host and leaves the others where
they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Final

from cluster.gpu_shares import NodeGpus
from cluster.inventory import matches
from cluster.messages import HostSpec, NodeInfo

# Weights may be 0.8 of a host's memory, as in `cluster.inventory`: the rest is the process and its buffers.
_MEMORY_PER_WEIGHT: Final = 1.25


@dataclass(frozen=True, slots=True)
class Limits:
    """What is known of where hosts may run, beyond what the nodes say themselves."""

    selectors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Host id → the labels that its node must have, in Ray's notation."""
    reserved_bytes: Mapping[str, int] = field(default_factory=dict)
    """Node id → bytes that the engines take there."""
    reserved_gpus: Mapping[str, tuple[Decimal, ...]] = field(default_factory=dict)
    """Node id → the shares of GPUs that the engines take there."""
    drained: tuple[str, ...] = ()
    """Ids of nodes that nothing is placed on."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A host and where it lies, running or not: its memory is kept for it."""

    spec: HostSpec
    node_id: str
    weight_bytes: int
    """Of its experts, as it reported when it was ready; 0 if it never was."""


def new_home(
    moving: Resident, residents: Sequence[Resident], nodes: Sequence[NodeInfo], limits: Limits
) -> NodeInfo | None:
    """The node for `moving`, of those with room; None if there is none.

    First those where no other host has a copy of its experts, among them those where it shares a GPU with an engine,
    which then computes with its memory, then the one with most memory left. `residents` are all other hosts.
    """
    able = [
        node
        for node in nodes
        if node.node_id not in limits.drained
        and matches(limits.selectors.get(moving.spec.host_id, {}), node.labels)
        and has_room(moving, node, residents, limits)
    ]
    return min(
        able,
        key=lambda node: (
            _shared(moving, node, residents),
            not (moving.spec.gpus and _gpus(moving, node, residents, limits).last_beside_engine),
            -_memory_left(node, residents, limits),
            node.node_id,
        ),
        default=None,
    )


def has_room(moving: Resident, node: NodeInfo, residents: Sequence[Resident], limits: Limits) -> bool:
    """Whether the node has the device and what the host takes of it."""
    if moving.spec.gpus:
        return _gpus(moving, node, residents, limits).granted
    # A node that was started with no CPUs is one on which nothing should run, such as a bare head.
    return node.cpus >= 1 and _memory_left(node, residents, limits) >= memory(moving)


def memory(host: Resident) -> int:
    """Bytes of its node's memory that a host takes; the weights of a GPU host lie elsewhere."""
    return 0 if host.spec.gpus else int(host.weight_bytes * _MEMORY_PER_WEIGHT)


def moved(spec: HostSpec, node: NodeInfo) -> HostSpec:
    """The planned specification, changed to what it must be on `node`."""
    if node.node_id == spec.node_id:
        return spec
    # Engines that reached the host by unix socket are on its planned node: from another one only TCP leads there.
    return replace(
        spec,
        node_id=node.node_id,
        tcp_ip=node.ip,
        threads=min(spec.threads, max(1, int(node.cpus))),
    )


def _gpus(moving: Resident, node: NodeInfo, residents: Sequence[Resident], limits: Limits) -> NodeGpus:
    """The node's GPUs with the host on one of them."""
    shares = (other.spec.gpus for other in residents if other.node_id == node.node_id and other.spec.gpus)
    there = NodeGpus(int(node.gpus), limits.reserved_gpus.get(node.node_id, ()), tuple(shares))
    return there.with_host(moving.spec.gpus, late=True)


def _memory_left(node: NodeInfo, residents: Sequence[Resident], limits: Limits) -> int:
    taken = sum(memory(other) for other in residents if other.node_id == node.node_id)
    return node.memory_bytes - limits.reserved_bytes.get(node.node_id, 0) - taken


def _shared(moving: Resident, node: NodeInfo, residents: Sequence[Resident]) -> int:
    """How many copies of its experts lie on the node already."""
    return sum(
        len(set(experts) & set(other.spec.experts.get(layer, ())))
        for other in residents
        if other.node_id == node.node_id
        for layer, experts in moving.spec.experts.items()
    )
