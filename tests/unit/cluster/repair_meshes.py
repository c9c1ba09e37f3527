"""The meshes that the repair's histories begin with."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from cluster.messages import HostAddress, HostSpec, NodeInfo


@dataclass
class Process:
    """One launch of a host as it really is."""

    host_id: str
    generation: int
    node_id: str
    address: HostAddress
    state: str = "loading"
    was_ready: bool = False
    frozen_until: float = 0.0


@dataclass(frozen=True)
class Mesh:
    """What is to run, and where it may."""

    alike: bool
    """Whether all hosts weigh the same."""
    weights: dict[str, int]
    specs: dict[str, HostSpec]
    nodes: dict[str, NodeInfo]


def random_mesh(random: Random) -> Mesh:
    """Two to five hosts on two to four nodes that have room for them, some for more."""
    hosts = random.randint(2, 5)
    alike = random.random() < 0.6
    copies = random.randint(1, min(2, hosts))
    # One expert for each host's turn: host i holds the experts i to i + copies - 1.
    experts = [tuple(sorted((i + k) % hosts for k in range(copies))) for i in range(hosts)]
    weights = {f"h{i}": 80 * (1 if alike else random.randint(1, 3)) for i in range(hosts)}
    number = random.randint(2, 4)
    homes = {host_id: f"n{i % number}" for i, host_id in enumerate(weights)}
    needed = {n: sum(125 * w // 100 for h, w in weights.items() if homes[h] == n) for n in homes.values()}
    nodes = {}
    for i in range(number):
        memory = needed.get(f"n{i}", 0) + 100 * random.choice((0, 1, 2, 3))
        nodes[f"n{i}"] = NodeInfo(f"n{i}", f"10.0.0.{i}", f"n{i}", 4, 0, memory)
    specs = {
        host_id: HostSpec(
            host_id, homes[host_id], "/m", "m", "m", "float32", "cpu", "auto", 1, {0: held}, host_id, "", 0
        )
        for host_id, held in zip(weights, experts, strict=True)
    }
    return Mesh(alike, weights, specs, nodes)
