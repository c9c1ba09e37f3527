"""Decides when another placement follows, and which: what is measured in, a proposal out.

every look:  hosts that came, or are to leave?  → plan at once
             enough new traffic since the last look, and time?  → plan; if it gains enough, twice in a row, follow
drain, scale:  plan without the hosts first, so that what can't be is refused before anything is changed
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Final

import structlog

from cluster.changes import Snapshot
from cluster.controller import Controller
from cluster.errors import ExpertmeshError, HostError, PlacementError
from cluster.fleet_view import fleet, layer_loads, plan_settings, proposal, settled
from cluster.group_loads import Queue
from cluster.group_loads import Snapshot as Loads
from cluster.holdings import by_host
from cluster.messages import Traffic
from cluster.moves import Proposal
from cluster.new_hosts import may_have, new_hosts, with_host
from cluster.router_queues import RouterQueues
from cluster.table import PlacementTable
from cluster.traffic import Routing, TrafficStatistics

log = structlog.get_logger()

# A plan that gains enough must be found so often in a row: one burst is no shift.
_IN_A_ROW: Final = 2
# Engines tell of themselves every few seconds; one that has not for so long is gone.
_SILENT_S: Final = 30.0


class Rebalancer:
    """Of one controller. Calls may come from several threads."""

    def __init__(self, controller: Controller, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller, self._clock = controller, clock
        self._lock = threading.Lock()
        self._queues = RouterQueues(clock, _SILENT_S)
        self._traffic: tuple[str, TrafficStatistics] | None = None
        self._next_look = 0.0
        self._members: frozenset[tuple[str, bool]] | None = None
        self._found = 0
        self.last: Proposal | None = None
        """What was last found, made or not."""

    def count(self, traffic: Traffic) -> Routing | None:
        """Take in what an engine counted; how even all engines' choices are now, None while the hosts are starting."""
        if traffic.waiting is not None and traffic.running is not None:
            self._queues.tell(traffic.engine, Queue(traffic.waiting, traffic.running))
        snapshot = self._controller.changes.snapshot()
        if snapshot is None:
            return None
        with self._lock:
            statistics = self._statistics(snapshot)
            statistics.add(traffic, snapshot.costs)
            return statistics.routing()

    def statistics(self) -> TrafficStatistics:
        """What is known of the traffic. HostError while the hosts are starting."""
        with self._lock:
            return self._statistics(self._snapshot())

    def loads(self) -> Loads:
        """What the groups have to do, for the autoscaler. HostError while the hosts are starting."""
        snapshot = self._snapshot()
        deployment = snapshot.deployment
        staying = [spec.group for spec in deployment.hosts if spec.host_id not in deployment.leaving]
        reports, at = self._controller.reports(), self._clock()
        return Loads(
            at,
            {group.name: staying.count(group.name) for group in deployment.groups},
            {spec.host_id: spec.group for spec in deployment.hosts},
            reports,
            {host.host_id: host.memory_bytes for host in fleet(snapshot, {})},
            self._queues.total(),
        )

    def look(self) -> None:
        """Plan if it is time, and let the placement follow if that is worth it."""
        snapshot = self._controller.changes.snapshot()
        if snapshot is None or snapshot.deployment.following is not None or not settled(snapshot):
            return
        members = frozenset((host_id, host_id in snapshot.deployment.leaving) for host_id in snapshot.hosts)
        if self._members is None:
            self._members = _placed(snapshot)
        config = snapshot.deployment.placement.rebalance
        changed, now = members != self._members, self._clock()
        if not changed and (config.mode == "manual" or now < self._next_look):
            return
        self._next_look = now + config.interval
        self._members = members
        try:
            found = self.propose(snapshot, must=changed)
        except PlacementError as error:
            log.warning("no placement found", reason=error.message)
            return
        self.last = found
        self._found = self._found + 1 if found.worthwhile else 0
        if found.worthwhile and (changed or self._found >= _IN_A_ROW):
            self._found = 0
            self._follow(found, "hosts came or are to leave" if changed else f"{found.gain:.0%} less time")

    def propose(
        self, snapshot: Snapshot | None = None, *, must: bool = False, explain: bool = False
    ) -> Proposal:
        """The placement that would follow now. `must`: hosts came or leave, so that any gain is worth it."""
        snapshot = snapshot or self._snapshot()
        with self._lock:
            statistics = self._statistics(snapshot)
            hosts = fleet(snapshot, statistics.costs(snapshot.costs))
            loads = layer_loads(snapshot.deployment, statistics)
        return proposal(
            snapshot.deployment,
            hosts,
            loads,
            plan_settings(snapshot.deployment, hosts),
            must=must,
            explain=explain,
        )

    def rebalance(self) -> Proposal:
        """Let the best placement follow now if it gains anything. HostError while a change is under way."""
        found = self.propose(must=True, explain=True)
        if found.worthwhile:
            self._follow(found, "asked for")
        return found

    def drain(self, node: str) -> list[str]:
        """Empty a node's hosts, and end them; their ids. PlacementError if the others can't take what they hold."""
        snapshot = self._snapshot()
        node_id = node_id_of(snapshot, node)
        going = [host_id for host_id, host in snapshot.hosts.items() if host.node_id == node_id]
        self._try_without(snapshot, going, f"node {node} can't be drained")
        self._controller.changes.drain([node_id], drained=True)
        self._controller.changes.leave(going)
        return going

    def undrain(self, node: str) -> None:
        """Hosts may be placed on a node again."""
        snapshot = self._snapshot()
        self._controller.changes.drain([node_id_of(snapshot, node)], drained=False)

    def leave(self, going: Collection[str], what: str) -> None:
        """Empty hosts, and end them. PlacementError, beginning with `what`, if the others can't take what they hold."""
        self._try_without(self._snapshot(), going, what)
        self._controller.changes.leave(going)

    def scale(self, group: str, count: int) -> tuple[list[str], list[str]]:
        """Change a group to so many hosts: those that come, and those that leave."""
        if count < 0:
            raise PlacementError(f"a group can't have {count} hosts")
        snapshot = self._snapshot()
        deployment = snapshot.deployment
        wanted = deployment.group(group)
        if wanted.count == "per_node":
            raise PlacementError(
                f"host group {group} has one host on every node that matches", "drain a node, or add one"
            )
        mine = [
            s.host_id for s in deployment.hosts if s.group == group and s.host_id not in deployment.leaving
        ]
        if count < len(mine):
            going = mine[count:]
            self._try_without(snapshot, going, f"host group {group} can't be scaled to {count}")
            self._controller.changes.leave(going)
            return [], going
        # All of them first: where not all find room, none is started.
        coming = new_hosts(snapshot, group, count - len(mine))
        for spec in coming:
            self._controller.changes.join(spec)
        return [spec.host_id for spec in coming], []

    def take_in(self) -> list[str]:
        """Hosts on nodes that joined, of groups that have one on every node; their ids."""
        snapshot = self._controller.changes.snapshot()
        if snapshot is None or all(group.count != "per_node" for group in snapshot.deployment.groups):
            return []
        coming = []
        for group in snapshot.deployment.groups:
            if group.count != "per_node":
                continue
            mine = [spec for spec in snapshot.deployment.hosts if spec.group == group.name]
            held = {*snapshot.deployment.limits.drained, *(snapshot.hosts[s.host_id].node_id for s in mine)}
            for node in snapshot.nodes:
                if node.node_id in held or not may_have(group, node):
                    continue
                (spec,) = new_hosts(replace(snapshot, nodes=(node,)), group.name, 1)
                self._controller.changes.join(spec)
                snapshot = with_host(snapshot, spec)
                coming.append(spec.host_id)
        return coming

    def _try_without(self, snapshot: Snapshot, going: Collection[str], what: str) -> None:
        deployment = snapshot.deployment
        emptied = replace(deployment, leaving=(*deployment.leaving, *going))
        try:
            self.propose(replace(snapshot, deployment=emptied), must=True)
        except PlacementError as error:
            raise PlacementError(f"{what}: {error.message}", error.hint) from None

    def _follow(self, found: Proposal, reason: str) -> None:
        log.info(
            "placement is to change",
            loads=found.loads,
            drops=found.drops,
            gain=f"{found.gain:.1%}",
            reason=reason,
        )
        try:
            self._controller.changes.follow(dict(found.experts), reason)
        except ExpertmeshError as error:
            log.warning("placement not changed", reason=error.message)

    def _snapshot(self) -> Snapshot:
        snapshot = self._controller.changes.snapshot()
        if snapshot is None:
            raise HostError("the hosts are still starting", "try again when `expertmesh status` says ready")
        return snapshot

    def _statistics(self, snapshot: Snapshot) -> TrafficStatistics:
        run = snapshot.deployment.run
        if self._traffic is None or self._traffic[0] != run:
            self._traffic = run, TrafficStatistics(snapshot.deployment.layers)
        return self._traffic[1]


def _placed(snapshot: Snapshot) -> frozenset[tuple[str, bool]]:
    """Who was there when the table was made: a predecessor may have ended before it saw who came or was to leave."""
    held = by_host(PlacementTable.from_json(snapshot.deployment.table).experts)
    leaving = snapshot.deployment.leaving
    return frozenset((host, host not in held) for host in snapshot.hosts if host in held or host in leaving)


def node_id_of(snapshot: Snapshot, name: str) -> str:
    """The id of the node of that id, the beginning of it, or that name or address."""
    found = [
        n
        for n in snapshot.nodes
        if name in (n.node_id, n.hostname, n.ip) or (len(name) >= 6 and n.node_id.startswith(name))
    ]
    if len(found) == 1:
        return found[0].node_id
    known = ", ".join(f"{node.hostname} ({node.ip}, {node.node_id[:12]})" for node in snapshot.nodes)
    what = f"several nodes are called {name}" if found else f"there is no node {name}"
    raise PlacementError(what, f"nodes: {known}")
