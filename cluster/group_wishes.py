"""Host groups that are to have other hosts than there are nodes for now: scaled, evacuated, and followed up.

scale:   fewer at once, more as nodes join
drain:   the node's hosts go elsewhere, and as many take their place as soon as there are nodes
pursue:  every second or so: starts what there is a node for by now, empties what can be emptied by now

What is wished for is in the deployment, so that a new controller goes on with it. An operator that brings nodes
reads `report`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import structlog

from cluster.changes import Snapshot
from cluster.config import HostGroup
from cluster.controller import Controller
from cluster.displaced import (
    doubled,
    evacuating,
    free_nodes,
    hosts_on_free_nodes,
    not_evacuating,
    on_evacuated,
    settled_hosts,
    staying,
    wishing,
)
from cluster.errors import ExpertmeshError, HostError, PlacementError
from cluster.external_nodes import ExternalNodeProvider
from cluster.groups_report import Drained, GroupsReport, GroupState, NodeState, Scaled
from cluster.messages import HostSpec
from cluster.new_hosts import new_hosts
from cluster.rebalancer import Rebalancer, node_id_of
from cluster.repair_state import Phase

log = structlog.get_logger()

# A plan without some hosts takes the planner a while: it is tried again when something changed, or after so long.
_AGAIN_S: Final = 15.0


class GroupWishes:
    """Of one controller. Calls may come from several threads."""

    def __init__(
        self,
        controller: Controller,
        rebalancer: Rebalancer,
        nodes: ExternalNodeProvider | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._controller, self._rebalancer = controller, rebalancer
        self._nodes = nodes or ExternalNodeProvider()
        self._clock = clock
        self._changing = threading.Lock()
        self._tried: tuple[object, float] | None = None
        self._stuck = ""
        self._lacking: dict[str, str] = {}

    def report(self) -> GroupsReport:
        """Groups and nodes as they are. HostError while the hosts are starting, or without a deployment."""
        snapshot = self._snapshot()
        deployment, change = snapshot.deployment, self._controller.changes.change()
        asked = {name: shape.count for name, shape in self._nodes.wanted().items()}
        return GroupsReport(
            deployment.served_name,
            deployment.run,
            change.epoch,
            tuple(self._group(snapshot, group, asked) for group in deployment.groups),
            _nodes(snapshot, self._stuck),
            change.reason,
        )

    def scale(self, group: str, hosts: int) -> Scaled:
        """The group is to have so many hosts: fewer from now on, more as nodes for them join.

        PlacementError if that can't be: no such group, one host per node, too little room without those that leave.
        """
        with self._changing:
            snapshot = self._snapshot()
            if self._scalable(snapshot, group, hosts) and hosts > len(staying(snapshot, group)):
                self._controller.changes.amend(partial(wishing, group=group, count=hosts))
                coming = self._start(group)
                lacking = hosts - len(settled_hosts(self._snapshot(), group))
                return Scaled(hosts, tuple(coming), (), max(0, lacking), self._lacking.get(group, ""))
            _, leaving = self._rebalancer.scale(group, hosts)
            self._controller.changes.amend(partial(wishing, group=group, count=None))
            return Scaled(hosts, (), tuple(leaving), 0)

    def scale_now(self, group: str, hosts: int) -> None:
        """The same for the autoscaler, which asks for nodes itself: PlacementError if not all find a node now."""
        with self._changing:
            snapshot = self._snapshot()
            more = hosts - len(staying(snapshot, group))
            if more <= 0 or snapshot.deployment.nodes != "operator":
                self._rebalancer.scale(group, hosts)
                if more < 0:
                    self._controller.changes.amend(partial(wishing, group=group, count=None))
                return
            self._scalable(snapshot, group, hosts)
            coming = hosts_on_free_nodes(snapshot, snapshot.deployment.group(group), more)
            if len(coming) < more:
                raise PlacementError(
                    f"host group {group}: {more} more hosts need a node each, {len(coming)} are free",
                    "nodes come in minutes; see `GET /groups`",
                )
            for spec in coming:
                self._controller.changes.join(spec)

    def drain(self, node: str, reason: str) -> Drained:
        """Have a node's hosts go elsewhere. PlacementError if there is no such node, HostError while hosts start."""
        with self._changing:
            snapshot = self._snapshot()
            node_id = node_id_of(snapshot, node)
            deployment = snapshot.deployment
            here = [h for h in on_node(snapshot, node_id) if h not in deployment.leaving]
            moved = Counter(deployment.spec(host).group for host in here)
            wanted = {
                group: len(staying(snapshot, group))
                for group in moved
                if deployment.group(group).count != "per_node"
            }
            self._controller.changes.amend(partial(evacuating, node_id=node_id, reason=reason, wanted=wanted))
            self._tried = None
            self._pursue()
            left = set(on_evacuated(self._snapshot()))
            return Drained(
                node_id,
                tuple(host for host in on_node(self._snapshot(), node_id) if host not in left),
                tuple(host for host in here if host in left),
                self._stuck if left.intersection(here) else "",
            )

    def undrain(self, node: str) -> None:
        """Hosts may be placed on a node again; those that leave it do so."""
        with self._changing:
            node_id = node_id_of(self._snapshot(), node)
            self._controller.changes.amend(partial(not_evacuating, node_ids=[node_id]))

    def pursue(self) -> None:
        """Do what has become possible. Nothing before every host was ready once."""
        if self._controller.changes.snapshot() is not None:
            with self._changing:
                self._pursue()

    def _pursue(self) -> None:
        snapshot = self._snapshot()
        living = {node.node_id for node in snapshot.nodes}
        if gone := [node for node in snapshot.deployment.evacuated if node not in living]:
            self._controller.changes.amend(partial(not_evacuating, node_ids=gone))
        for group in snapshot.deployment.groups:
            if group.name in snapshot.deployment.wishes:
                self._start(group.name)
            elif group.count != "per_node" and snapshot.deployment.nodes == "operator":
                self._part(snapshot, group)
        self._empty()

    def _start(self, group: str) -> list[str]:
        """Start hosts that are wished for and for which there is a node; their ids. The wish ends when it is so."""
        snapshot = self._snapshot()
        deployment = snapshot.deployment
        wish = deployment.wishes[group]
        missing = wish - len(settled_hosts(snapshot, group))
        if missing <= 0:
            self._lacking.pop(group, None)
            if not set(on_evacuated(snapshot)).intersection(staying(snapshot, group)):
                self._controller.changes.amend(partial(wishing, group=group, count=None))
            return []
        coming: list[HostSpec] = []
        try:
            if deployment.nodes == "operator":
                coming = hosts_on_free_nodes(snapshot, deployment.group(group), missing)
            else:
                for number in range(1, missing + 1):
                    coming = new_hosts(snapshot, group, number)
        except PlacementError as error:
            self._lacking[group] = error.message
        else:
            left = missing - len(coming)
            self._lacking[group] = f"{left} more need a node each" if left else ""
        for spec in coming:
            self._controller.changes.join(spec)
        return [spec.host_id for spec in coming]

    def _part(self, snapshot: Snapshot, group: HostGroup) -> None:
        """Give hosts that share a node, as after the loss of one, a node each once there are free ones."""
        free = len(free_nodes(snapshot, group))
        if sharing := doubled(snapshot, group.name)[:free]:
            coming = hosts_on_free_nodes(snapshot, group, len(sharing))
            for spec in coming:
                self._controller.changes.join(spec)
            self._controller.changes.leave(sharing[: len(coming)])

    def _empty(self) -> None:
        """Let hosts leave evacuated nodes if the others can stand in for them; says in `_stuck` why not."""
        snapshot = self._snapshot()
        if not (going := on_evacuated(snapshot)):
            self._stuck = ""
            return
        seen = frozenset((h, host.phase, host.node_id) for h, host in snapshot.hosts.items())
        now = self._clock()
        if self._tried is not None and self._tried[0] == seen and now - self._tried[1] < _AGAIN_S:
            return
        self._tried = seen, now
        try:
            self._rebalancer.leave(going, "the nodes can't be drained yet")
            self._stuck = ""
            return
        except PlacementError as error:
            self._stuck = error.message
        by_node: dict[str, list[str]] = {}
        for host in going:
            by_node.setdefault(snapshot.hosts[host].node_id, []).append(host)
        for node_id, hosts in by_node.items() if len(by_node) > 1 else ():
            try:
                self._rebalancer.leave(hosts, f"node {node_id[:12]} can't be drained yet")
            except ExpertmeshError as error:
                self._stuck = error.message

    def _group(self, snapshot: Snapshot, group: HostGroup, asked: Mapping[str, int]) -> GroupState:
        here = staying(snapshot, group.name)
        ready = sum(snapshot.hosts[host].phase is Phase.READY for host in here)
        wanted = max(snapshot.deployment.wishes.get(group.name, len(here)), asked.get(group.name, 0))
        why = self._lacking.get(group.name, "") if group.name in snapshot.deployment.wishes else ""
        return GroupState(group.name, len(here), ready, None if group.count == "per_node" else wanted, why)

    def _scalable(self, snapshot: Snapshot, group: str, hosts: int) -> bool:
        """True, or PlacementError."""
        if hosts < 0:
            raise PlacementError(f"a group can't have {hosts} hosts")
        if snapshot.deployment.group(group).count == "per_node":
            raise PlacementError(
                f"host group {group} has one host on every node that matches", "drain a node, or add one"
            )
        return True

    def _snapshot(self) -> Snapshot:
        snapshot = self._controller.changes.snapshot()
        if snapshot is None:
            # Says so if there is nothing.
            self._controller.table()
            raise HostError("the hosts are still starting", "try again when `expertmesh status` says ready")
        return snapshot


def on_node(snapshot: Snapshot, node_id: str) -> list[str]:
    """Ids of all hosts that are on a node."""
    return [host_id for host_id, host in snapshot.hosts.items() if host.node_id == node_id]


def _nodes(snapshot: Snapshot, stuck: str) -> tuple[NodeState, ...]:
    deployment = snapshot.deployment
    cannot_leave = set(on_evacuated(snapshot))
    nodes = []
    for node in snapshot.nodes:
        here = on_node(snapshot, node.node_id)
        nodes.append(
            NodeState(
                node.node_id,
                node.ip,
                node.hostname,
                tuple(here),
                tuple(host for host in here if host in deployment.leaving),
                node.node_id in deployment.limits.drained,
                deployment.evacuated.get(node.node_id),
                stuck if cannot_leave.intersection(here) else "",
            )
        )
    return tuple(nodes)
