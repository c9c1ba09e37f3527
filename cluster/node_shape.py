"""What a group's hosts need of nodes, for whoever brings nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from cluster.config import HostGroup


@dataclass(frozen=True, slots=True)
class NodeShape:
    """Room for `count` hosts, each with these resources on one node; a node may have several of them."""

    count: int
    cpus: int
    gpus: Decimal = Decimal(0)
    """Of one GPU, 1 at most."""
    memory_bytes: int = 0
    """0 if it does not matter."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the node's labels must be, in Ray's notation, as `cluster.inventory.matches` reads it."""


def node_shape(group: HostGroup, count: int) -> NodeShape:
    """Room for so many hosts of the group.

    What is ``auto`` is taken from the node that a host comes to, so nothing can be said of it before: of such a
    group a host asks for one CPU. A GPU host's memory is its GPU's.
    """
    cpus = 1 if group.threads == "auto" else group.threads
    if group.device == "cuda":
        return NodeShape(count, cpus, gpus=group.gpu_share, labels=group.selector)
    memory = 0 if group.memory == "auto" else int(group.memory)
    return NodeShape(count, cpus, memory_bytes=memory, labels=group.selector)


def in_words(shape: NodeShape) -> str:
    """Such as ``2 × (4 CPU + 3 GiB where zone: b)``."""
    parts = [f"{shape.cpus} CPU"] if shape.cpus else []
    parts += [f"{shape.gpus:f} GPU"] if shape.gpus else []
    parts += [f"{shape.memory_bytes / 2**30:g} GiB"] if shape.memory_bytes else []
    labels = ", ".join(f"{key}: {value}" for key, value in sorted(shape.labels.items()))
    return f"{shape.count} × ({' + '.join(parts)}{f' where {labels}' if labels else ''})"
