"""Changes of a placement that serves: who asks for one, how far it is, and what is done for it.

What is to be done is decided in `cluster.reconcile`; here it is done, a step with every look of the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import structlog

from cluster.deployment import Deployment, flipped, followed_by, joined, left, to_leave
from cluster.errors import HostError
from cluster.in_use import TablesInUse
from cluster.ledger import Ledger
from cluster.live_versions import LiveVersions, variants_of
from cluster.messages import HostCost, HostHolds, HostSpec, NodeInfo
from cluster.reconcile import Abandon, Adopt, Flip, Todo, todo
from cluster.repair_state import HostState, Phase
from cluster.table import PlacementTable

log = structlog.get_logger()

# A host that loads answers all the same, within seconds.
_SILENT_S: Final = 30.0

_read_table = lru_cache(maxsize=4)(PlacementTable.from_json)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a controller knows, for whoever plans a placement."""

    deployment: Deployment
    hosts: Mapping[str, HostState]
    nodes: tuple[NodeInfo, ...]
    costs: Mapping[str, HostCost]
    """Of hosts that were measured."""


@dataclass(frozen=True, slots=True)
class ChangeStatus:
    """A change of the placement, as `status` shows it."""

    reason: str
    """Of the one under way; "" if there is none."""
    loading: tuple[str, ...]
    """Hosts that load or drop experts."""
    leaving: tuple[str, ...]
    absent: tuple[str, ...]
    """Hosts that are not ready."""
    abandoned: str
    """Why the last one did not come about."""
    epoch: int


class Changes:
    """Of one controller; calls may come from several threads."""

    def __init__(self, ledger: Ledger, in_use: TablesInUse) -> None:
        self._ledger, self._in_use = ledger, in_use
        self._settled: object = None
        self.abandoned = ""
        """Why the last change did not come about."""

    def follow(
        self,
        experts: Mapping[int, tuple[tuple[str, ...], ...]],
        reason: str,
        versions: LiveVersions | None = None,
    ) -> None:
        """Change to another placement: layer → per expert the ids of the hosts that are to hold it; or to hold other
        versions of them.

        Hosts load what they lack while the current one serves. HostError while a change is under way.
        """
        with self._ledger.change:
            deployment = self._changeable()
            if deployment.following is not None:
                raise HostError(
                    f"the placement is being changed already ({deployment.following.reason})",
                    "see `expertmesh status`, and try again when it is done",
                )
            self.abandoned = ""
            self._ledger.save(followed_by(deployment, experts, reason, versions), self._ledger.repair)

    def join(self, spec: HostSpec) -> None:
        """Start one more host, which holds no experts yet."""
        with self._ledger.change:
            deployment, state = self._changeable(), self._ledger.repair
            if spec.host_id in state.hosts:
                raise HostError(f"there is a host {spec.host_id} already")
            new = HostState(spec.node_id, Phase.DOWN)
            hosts = {**state.hosts, spec.host_id: new}
            self._ledger.save(joined(deployment, spec), replace(state, hosts=hosts, epoch=state.epoch + 1))
            log.info("host joins", host=spec.host_id, node=spec.node_id)

    def leave(self, host_ids: Collection[str]) -> None:
        """Let hosts leave as soon as no table names them any more: whoever plans the placements empties them."""
        with self._ledger.change:
            self._ledger.save(to_leave(self._changeable(), host_ids), self._ledger.repair)

    def drain(self, node_ids: Collection[str], *, drained: bool) -> None:
        """Place nothing on these nodes any more, or again."""
        with self._ledger.change:
            deployment = self._ledger.required()
            kept = [node for node in deployment.limits.drained if node not in node_ids]
            limits = replace(deployment.limits, drained=(*kept, *(node_ids if drained else ())))
            self._ledger.save(replace(deployment, limits=limits), self._ledger.repair)

    def amend(self, change: Callable[[Deployment], Deployment]) -> None:
        """Save the deployment as `change` makes it; for what concerns neither table nor hosts."""
        with self._ledger.change:
            deployment = self._ledger.required()
            if (after := change(deployment)) != deployment:
                self._ledger.save(after, self._ledger.repair)

    def change(self) -> ChangeStatus:
        """How far the change of the placement is, if there is one."""
        with self._ledger.change:
            deployment = self._ledger.required()
            following = deployment.following
            loading = [
                host_id
                for host_id, said in self._ledger.said.items()
                if said.holds is not None and said.holds.adopting
            ]
            return ChangeStatus(
                following.reason if following is not None else "",
                tuple(loading),
                deployment.leaving,
                tuple(h for h, host in self._ledger.repair.hosts.items() if host.phase is not Phase.READY),
                self.abandoned,
                self._ledger.repair.epoch,
            )

    def snapshot(self) -> Snapshot | None:
        """What a planner needs; None before every host was ready once, or without a deployment."""
        with self._ledger.change:
            deployment, state = self._ledger.deployment, self._ledger.repair
            if deployment is None or not state.repairing or state.nodes is None:
                return None
            costs = {
                host_id: said.cost for host_id, said in self._ledger.said.items() if said.cost is not None
            }
            return Snapshot(deployment, dict(state.hosts), state.nodes.living, costs)

    def reconcile(self) -> None:
        """Bring what hosts hold nearer to what the placements say."""
        with self._ledger.change:
            deployment, state = self._ledger.deployment, self._ledger.repair
            if deployment is None or not state.repairing:
                return
            in_use = self._in_use.everywhere(state.epoch, self._ledger.now())
            hosts = {
                host_id: self._holds(host_id) if host.phase is Phase.READY else None
                for host_id, host in state.hosts.items()
            }
            seen = deployment.table, deployment.following, deployment.leaving, in_use, hosts
            if seen == self._settled:
                return
            table = _read_table(deployment.table)
            actions = todo(
                table.experts,
                deployment.following,
                hosts,
                deployment.leaving,
                in_use=in_use,
                versions=table.versions,
            )
            for action in actions:
                self._do(action)
            self._settled = seen if not actions else None

    def _do(self, action: Todo) -> None:
        assert self._ledger.deployment is not None
        deployment, state = self._ledger.deployment, self._ledger.repair
        if isinstance(action, Adopt):
            bandwidth = int(deployment.placement.rebalance.bandwidth)
            following = deployment.following
            versions = following.versions if following is not None else None
            known = versions or _read_table(deployment.table).versions
            variants = variants_of(known, action.experts, deployment.sizes)
            self._ledger.running[action.host_id].adopt(action.experts, action.number, bandwidth, variants)
        elif isinstance(action, Flip):
            assert deployment.following is not None
            log.info("placement changed", epoch=state.epoch + 1, reason=deployment.following.reason)
            self._ledger.save(flipped(deployment), replace(state, epoch=state.epoch + 1))
        elif isinstance(action, Abandon):
            log.warning("placement not changed", reason=action.reason)
            self.abandoned = action.reason
            self._ledger.save(replace(deployment, following=None), state)
        else:
            hosts = {host_id: host for host_id, host in state.hosts.items() if host_id != action.host_id}
            self._ledger.save(
                left(deployment, action.host_id), replace(state, hosts=hosts, epoch=state.epoch + 1)
            )
            self._ledger.said.pop(action.host_id, None)
            host = self._ledger.running.pop(action.host_id, None)
            log.info("host leaves", host=action.host_id)
            try:
                if host is not None:
                    host.stop()
            except Exception as error:
                log.warning("host not ended", host=action.host_id, reason=str(error))

    def _holds(self, host_id: str) -> HostHolds | None:
        said = self._ledger.said.get(host_id)
        if said is None or host_id not in self._ledger.running:
            return None
        # One that stands still may never load what a change waits for.
        silent = self._ledger.now() - self._ledger.heard.get(host_id, 0.0)
        return said.holds if silent < _SILENT_S else None

    def _changeable(self) -> Deployment:
        """The deployment. HostError before every host was ready once."""
        deployment = self._ledger.required()
        if not self._ledger.repair.repairing:
            raise HostError("the hosts are still starting", "try again when `expertmesh status` says ready")
        return deployment
