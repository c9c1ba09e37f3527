"""What the cluster has, and which expert hosts go onto which node: pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Final

from cluster.config import HostGroup
from cluster.errors import PlacementError
from cluster.gpu_shares import NodeGpus
from cluster.messages import HostSlot, NodeInfo

# Part of a host's share of its node that may be expert weights; the rest is for the process itself, its
# buffers, and the peak while a layer is packed.
_WEIGHT_SHARE: Final = 0.8
# Ray reports a GPU's kind, not its memory: the smallest that is sold under each name, in GiB.
_GPU_GIB: Final[Mapping[str, int]] = {
    "T4": 16,
    "V100": 16,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
    "A100": 40,
    "H100": 80,
    "H20": 96,
    "H200": 141,
    "B200": 180,
    "GB200": 186,
    "B300": 268,
    "GB300": 268,
}
_GPU_LABEL: Final = "ray.io/accelerator-type"
_SHARES: Final = (
    "; on a node of several GPUs Ray chooses which one a share comes from, by the order in which it is asked: "
    "equal shares, or a Ray node for each GPU, make the most of them"
)
_NEGATION: Final = re.compile(r"(!?)(?:in\(([^)]*)\)|(.*))")


def nodes_from_ray(raw: Sequence[Mapping[str, Any]]) -> tuple[NodeInfo, ...]:
    """The living nodes among ``ray.nodes()``'s, sorted by id."""
    nodes = []
    for entry in raw:
        if not entry.get("Alive"):
            continue
        resources = entry.get("Resources") or {}
        nodes.append(
            NodeInfo(
                node_id=str(entry["NodeID"]),
                ip=str(entry.get("NodeManagerAddress", "")),
                hostname=str(entry.get("NodeManagerHostname", "")),
                cpus=float(resources.get("CPU", 0)),
                gpus=float(resources.get("GPU", 0)),
                memory_bytes=int(resources.get("memory", 0)),
                labels=dict(entry.get("Labels") or {}),
            )
        )
    return tuple(sorted(nodes, key=lambda node: node.node_id))


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels satisfy a selector in Ray's notation: ``b``, ``!b``, ``in(a, b)`` or ``!in(a, b)``."""
    for key, wanted in selector.items():
        match = _NEGATION.fullmatch(wanted.strip())
        assert match is not None  # the last alternative takes any text
        values = {value.strip() for value in (match[2] if match[2] is not None else match[3]).split(",")}
        if (labels.get(key) in values) == bool(match[1]):
            return False
    return True


@dataclass
class _Room:
    """What is left of one node while hosts are laid onto it."""

    node: NodeInfo
    memory: int
    gpus: NodeGpus
    cpu_hosts: int = 0
    """Hosts whose memory is ``auto``: they share what explicit limits leave."""
    hosts: int = 0
    running: bool = False
    """Whether those that it has were started before."""

    @property
    def share(self) -> int:
        """Bytes that one more host of ``auto`` memory would get."""
        return self.memory // (self.cpu_hosts + 1)

    def with_gpu(self, share: Decimal) -> NodeGpus:
        """Its GPUs with one more host on one of them."""
        return self.gpus.with_host(share, late=self.running)


def slots(
    groups: Sequence[HostGroup],
    nodes: Sequence[NodeInfo],
    *,
    reserved_memory: Mapping[str, int] | None = None,
    reserved_gpus: Mapping[str, tuple[Decimal, ...]] | None = None,
) -> tuple[HostSlot, ...]:
    """Lay the groups' hosts onto nodes, in turn, those with most free memory first; hosts on GPUs first of all where
    they share one with an engine, which then computes with their memory.

    ``reserved_*`` say by node id what the engines take (bytes, shares of GPUs). A host's memory of ``auto`` is its
    share of what the node has left, a GPU host's its share of its GPU's; threads of ``auto`` are the node's cores
    over its hosts. Host ids are the group's name and a number.

    Raises PlacementError if no node matches a group, or those that do have too little memory or GPUs.
    """
    rooms = _rooms(nodes, reserved_memory or {}, reserved_gpus or {})
    chosen: list[tuple[HostGroup, str, _Room]] = []
    for group in groups:
        matching = _matching(group, rooms)
        taken: Counter[str] = Counter()
        wanted = len(matching) if group.count == "per_node" else group.count
        for index in range(wanted):
            fitting = [room for room in matching if _fits(group, room)]
            if group.count == "per_node":
                fitting = [room for room in fitting if not taken[room.node.node_id]]
            if not fitting:
                raise _no_room(group, index, wanted, matching)
            room = min(fitting, key=partial(_turn, group, taken))
            taken[room.node.node_id] += 1
            _take(group, room)
            chosen.append((group, f"{group.name}-{index}", room))
    return tuple(_slot(group, host_id, room) for group, host_id, room in chosen)


def join(
    group: HostGroup,
    host_id: str,
    placed: Sequence[tuple[HostGroup, str]],
    nodes: Sequence[NodeInfo],
    *,
    reserved_memory: Mapping[str, int] | None = None,
    reserved_gpus: Mapping[str, tuple[Decimal, ...]] | None = None,
) -> HostSlot:
    """A slot for one more host, beside those that there are: (group, node id) of each.

    On a GPU that an engine has a share of, else on the node that has fewest of its group, then most memory for it.
    Raises PlacementError if none has room.
    """
    rooms = _filled(placed, nodes, reserved_memory or {}, reserved_gpus or {})
    for room in rooms.values():
        room.running = True
    mine = Counter(node_id for other, node_id in placed if other.name == group.name)
    matching = _matching(group, rooms)
    fitting = [room for room in matching if _fits(group, room)]
    if not fitting:
        raise _no_room(group, sum(mine.values()), sum(mine.values()) + 1, matching)
    room = min(fitting, key=partial(_turn, group, mine))
    _take(group, room)
    return _slot(group, host_id, room)


def weight_limits(
    placed: Sequence[tuple[HostGroup, str]],
    nodes: Sequence[NodeInfo],
    *,
    reserved_memory: Mapping[str, int] | None = None,
    reserved_gpus: Mapping[str, tuple[Decimal, ...]] | None = None,
) -> list[int]:
    """Bytes of weights that each of these hosts, (group, node id), may hold; 0 on a node that is gone.

    Hosts of ``auto`` memory share what their node has, so each may hold less when another one joins.
    """
    rooms = _filled(placed, nodes, reserved_memory or {}, reserved_gpus or {})
    return [_memory(group, rooms[node_id]) if node_id in rooms else 0 for group, node_id in placed]


def _rooms(
    nodes: Sequence[NodeInfo],
    reserved_memory: Mapping[str, int],
    reserved_gpus: Mapping[str, tuple[Decimal, ...]],
) -> dict[str, _Room]:
    return {
        node.node_id: _Room(
            node,
            memory=max(0, node.memory_bytes - reserved_memory.get(node.node_id, 0)),
            gpus=NodeGpus(int(node.gpus), reserved_gpus.get(node.node_id, ())),
        )
        for node in nodes
    }


def _filled(
    placed: Sequence[tuple[HostGroup, str]],
    nodes: Sequence[NodeInfo],
    reserved_memory: Mapping[str, int],
    reserved_gpus: Mapping[str, tuple[Decimal, ...]],
) -> dict[str, _Room]:
    rooms = _rooms(nodes, reserved_memory, reserved_gpus)
    for group, node_id in placed:
        if node_id in rooms:
            _take(group, rooms[node_id])
    return rooms


def _slot(group: HostGroup, host_id: str, room: _Room) -> HostSlot:
    return HostSlot(
        host_id=host_id,
        group=group.name,
        device=group.device,
        node_id=room.node.node_id,
        memory_bytes=_memory(group, room),
        threads=max(1, int(room.node.cpus) // room.hosts) if group.threads == "auto" else group.threads,
        gpus=group.gpu_share,
    )


def _turn(group: HostGroup, mine: Mapping[str, int], room: _Room) -> tuple[bool, int, int, int, str]:
    """The smallest is the room that the group's next host goes to; `mine` counts its hosts by node."""
    beside = bool(group.gpu_share) and room.with_gpu(group.gpu_share).last_beside_engine
    return not beside, mine[room.node.node_id], -room.share, room.hosts, room.node.node_id


def _matching(group: HostGroup, rooms: Mapping[str, _Room]) -> list[_Room]:
    labelled = [room for room in rooms.values() if matches(group.selector, room.node.labels)]
    if not labelled:
        # Ray gives every node a label with its own id, which says nothing about what there is.
        known = sorted(
            {
                f"{k}: {v}"
                for room in rooms.values()
                for k, v in room.node.labels.items()
                if k != "ray.io/node-id"
            }
        )
        wanted = ", ".join(f"{key}: {value}" for key, value in group.selector.items()) or "(none)"
        raise PlacementError(
            f"host group {group.name}: no node matches the selector {wanted}",
            f"labels that exist on {len(rooms)} nodes: {', '.join(known) or 'none'}; "
            "label a node with `ray start --labels=...`",
        )
    if group.device == "cuda":
        fit = [room for room in labelled if room.node.gpus >= 1]
        lack = "has a GPU"
    else:
        # A node that was started with no CPUs is one on which nothing should run, such as a bare head.
        needed = 1 if group.threads == "auto" else group.threads
        fit = [room for room in labelled if room.node.cpus >= needed]
        lack = f"has {needed} CPUs"
    if not fit:
        have = ", ".join(f"{r.node.hostname}: {r.node.cpus:g} CPUs, {r.node.gpus:g} GPUs" for r in labelled)
        raise PlacementError(
            f"host group {group.name}: none of the {len(labelled)} matching nodes {lack}",
            f"they have: {have}",
        )
    return fit


def _fits(group: HostGroup, room: _Room) -> bool:
    if group.gpu_share:
        return room.with_gpu(group.gpu_share).granted
    return room.memory >= (1 if group.memory == "auto" else group.memory)


def _take(group: HostGroup, room: _Room) -> None:
    room.hosts += 1
    if group.gpu_share:
        room.gpus = room.with_gpu(group.gpu_share)
    elif group.memory == "auto":
        room.cpu_hosts += 1
    else:
        room.memory -= group.memory


def _memory(group: HostGroup, room: _Room) -> int:
    if group.memory != "auto":
        return group.memory
    if group.device == "cpu":
        return max(0, int(room.memory * _WEIGHT_SHARE) // room.cpu_hosts)
    kind = room.node.labels.get(_GPU_LABEL, "")
    if kind not in _GPU_GIB:
        raise PlacementError(
            f"host group {group.name}: the memory of the GPUs on {room.node.hostname} is not known "
            f"({kind or 'no accelerator label'})",
            "set the group's memory to what one host may hold, such as 20GiB",
        )
    return int(_GPU_GIB[kind] * 2**30 * _WEIGHT_SHARE * float(group.gpu_share))


def _no_room(group: HostGroup, placed: int, wanted: int, matching: Sequence[_Room]) -> PlacementError:
    if group.gpu_share:
        there = "; ".join(f"{room.node.hostname} has {room.gpus}" for room in matching)
        several = any(room.gpus.number > 1 for room in matching)
        wants = "a GPU" if group.gpu_share == 1 else f"{group.gpu_share:f} of a GPU"
        return PlacementError(
            f"host group {group.name}: {placed} of {wanted} hosts get {wants} each: {there}",
            f"lower the group's gpus or count, or engine.gpus, or add GPU nodes{_SHARES if several else ''}",
        )
    left = ", ".join(f"{room.node.hostname} {room.memory / 2**30:.1f} GiB" for room in matching)
    return PlacementError(
        f"host group {group.name}: {placed} of {wanted} hosts fit; memory left: {left}",
        "lower the group's memory or count, or leave memory at auto to share what there is",
    )
