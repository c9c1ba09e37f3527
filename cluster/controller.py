"""The controller: starts the expert hosts, repairs them, owns the placement table, answers who is where.

What is to be done is decided in `cluster.repair`; here it is done. Its state is one JSON document in a store that
outlives it; a new controller reads it and finds the hosts again. Ray comes in through `cluster.ports`, so unit
tests need none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import structlog

from cluster import repair, rounds
from cluster.deployment import (
    Deployment,
    complete,
    flipped,
    followed_by,
    from_document,
    joined,
    left,
    to_document,
    to_leave,
)
from cluster.errors import HostError
from cluster.in_use import TablesInUse
from cluster.messages import HostCost, HostHolds, HostProgress, HostReport, HostSpec, NodeInfo, Sources
from cluster.ports import Host, Hosts, Nodes, Store
from cluster.reconcile import Abandon, Adopt, Flip, Todo, todo
from cluster.repair_state import (
    RUNNING,
    Backoff,
    End,
    HostDead,
    HostReady,
    HostState,
    HostStatus,
    Launch,
    NodesSeen,
    Observation,
    Phase,
    Publish,
    Repair,
    Tick,
    Wanted,
    planned,
    sources,
    statuses,
)
from cluster.rounds import Rounds, in_short
from cluster.table import PlacementTable

log = structlog.get_logger()

# How long a host that is asked how it is may take, and for how long the others' repair waits for it.
_PATIENCE_S = 5.0
_ROUND_S = 0.5
# How often `publish` looks for itself, where nothing supervises.
_WAIT_S = 0.2
# While hosts load somebody waits for them.
_EAGER_S = 0.2

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


class Controller:
    """Owns one deployment. Calls may come from several threads; changes are made one at a time.

    Nothing waits for a host while it holds the lock of changes, so that `stop` is served at any time.
    """

    def __init__(
        self,
        hosts: Hosts,
        store: Store,
        nodes: Nodes,
        *,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
        silence_s: float = 45.0,
    ) -> None:
        """`silence_s`: an engine that has not asked for the next table for so long is gone."""
        self._hosts = hosts
        self._store = store
        self._nodes = nodes
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._rounds = Rounds(_PATIENCE_S, _ROUND_S)
        self._change = threading.Condition()
        self._looking = threading.Lock()
        self._supervised = False
        self._closed = threading.Event()
        self._deployment: Deployment | None = None
        self._repair = Repair({})
        self._running: dict[str, Host] = {}
        # Hosts that load and asked for sources. Not saved: they ask again and again.
        self._lacking: set[str] = set()
        # What hosts that are ready last said of themselves. Not saved: they say it again with every look.
        self._said: dict[str, HostReady] = {}
        self._in_use = TablesInUse(self._clock(), silence_s)
        self._settled: object = None
        self.abandoned = ""
        """Why the last change of the placement did not come about."""
        self._recover()

    def deploy(self, deployment: Deployment) -> None:
        """Start every host of `deployment`; returns while they load. HostError if another is deployed already.

        The same one may be deployed again: Ray repeats a call whose answer was lost with the controller.
        """
        with self._change:
            if self._deployment is None:
                specs = {spec.host_id: spec for spec in deployment.hosts}
                self._save(deployment, planned(specs, PlacementTable.from_json(deployment.table).epoch))
            elif not self._deployment.same(deployment):
                raise HostError(
                    f"{self._deployment.served_name} is deployed on this cluster already",
                    "end it with `expertmesh down` first",
                )
            self._launch_missing()

    def supervise(self, period_s: float) -> None:
        """From now on look after the hosts every `period_s` seconds, in a thread, until `close`."""
        self._supervised = True
        threading.Thread(
            target=self._supervise, args=(period_s,), name="expertmesh-supervise", daemon=True
        ).start()

    def close(self) -> None:
        """End the supervision; hosts go on."""
        self._closed.set()
        self._rounds.close()

    def look(self) -> None:
        """Look at nodes and hosts once, and repair what is to be repaired now.

        A second caller meanwhile returns at once. A host that does not answer is left as it is.
        """
        if not self._looking.acquire(blocking=False):
            return
        try:
            if self._deployment is None:
                return
            at = self._clock()
            try:
                living = self._nodes.living()
            except Exception as error:
                log.warning("nodes not seen", reason=str(error))
            else:
                self._feed(NodesSeen(at, living))
            with self._change:
                for host_id, known in self._repair.hosts.items():
                    if known.phase in RUNNING and host_id not in self._running:
                        self._find(host_id, known.generation, "no process of it was found")
                running = dict(self._running)
            for host_id, (host, answer) in self._rounds.ask(running).items():
                with self._change:
                    # Another deployment's host may have the name meanwhile.
                    if answer is not None and self._running.get(host_id) is host:
                        if isinstance(answer, HostReady):
                            self._said[host_id] = answer
                        self._feed(answer)
            self._feed(Tick())
            self._reconcile()
        finally:
            self._looking.release()

    def progress(self) -> list[HostProgress]:
        """How far each host is with loading, and why one can't be loaded."""
        with self._change:
            specs = self._deployment.hosts if self._deployment else ()
            running, hosts = dict(self._running), self._repair.hosts
        return rounds.progress(specs, running, hosts)

    def publish(self, timeout_s: float) -> str:
        """The table's JSON with the hosts' addresses, once every host was ready; every router that starts asks.

        Later, while a host is being repaired, the table without it, as soon as some host has each expert.
        HostError if that is not so in time, a host can't start, or the deployment is stopped meanwhile.
        """
        with self._change:
            asked = self._required()
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._supervised:
                self.look()
            with self._change:
                deployment = self._unless_ended(asked)
                if self._repair.repairing and complete(PlacementTable.from_json(deployment.table)):
                    return deployment.table
                late = [(h, host) for h, host in self._repair.hosts.items() if host.phase is not Phase.READY]
                for host_id, host in late:
                    if not self._repair.repairing and host.phase is not Phase.STARTING and host.reason:
                        raise HostError(f"host {host_id} could not start: {host.reason}")
                left = deadline - time.monotonic()
                if left <= 0:
                    host_id, host = late[0]
                    why = f": {host.reason}" if host.reason else ""
                    raise HostError(f"host {host_id} was not ready within {timeout_s:g} s{why}")
                self._change.wait(min(left, _WAIT_S))

    def next_table(self, after_epoch: int, timeout_s: float, engine: str = "") -> str:
        """JSON of the current table as soon as its epoch is later than `after_epoch`; "" if it is not in time.

        `engine` names who asks, and uses `after_epoch` meanwhile.
        """
        with self._change:
            if engine:
                self._in_use.heard(engine, after_epoch, self._clock())
            later = self._change.wait_for(
                lambda: self._deployment is not None and self._repair.epoch > after_epoch, timeout_s
            )
            return self._deployment.table if later and self._deployment is not None else ""

    def table(self) -> str:
        """JSON of the current table; HostError if nothing is deployed."""
        return self._required().table

    def states(self) -> list[HostStatus]:
        """Every host with its phase, crashes, the reason and when it is tried next."""
        with self._change:
            return statuses(self._repair, self._clock())

    def reports(self) -> Mapping[str, HostReport | str]:
        """Per host its report, or why there is none."""
        with self._change:
            running, hosts = dict(self._running), self._repair.hosts
        return rounds.reports(running, hosts)

    def sources(self, host_id: str) -> Sources:
        """Where a host may copy its experts from that loads on a node without the model's folder."""
        with self._change:
            self._lacking.add(host_id)
            return sources(self._repair, host_id, self._lacking)

    def deployment(self) -> Deployment | None:
        """What is deployed."""
        return self._deployment

    def follow(self, experts: dict[int, tuple[tuple[str, ...], ...]], reason: str) -> None:
        """Change to another placement: layer → per expert the ids of the hosts that are to hold it.

        Hosts load what they lack while the current one serves. HostError while a change is under way.
        """
        with self._change:
            deployment = self._changeable()
            if deployment.following is not None:
                raise HostError(
                    f"the placement is being changed already ({deployment.following.reason})",
                    "see `expertmesh status`, and try again when it is done",
                )
            self.abandoned = ""
            self._save(followed_by(deployment, experts, reason), self._repair)

    def join(self, spec: HostSpec) -> None:
        """Start one more host, which holds no experts yet."""
        with self._change:
            deployment, state = self._changeable(), self._repair
            if spec.host_id in state.hosts:
                raise HostError(f"there is a host {spec.host_id} already")
            new = HostState(spec.node_id, Phase.DOWN)
            hosts = {**state.hosts, spec.host_id: new}
            self._save(joined(deployment, spec), replace(state, hosts=hosts, epoch=state.epoch + 1))
            log.info("host joins", host=spec.host_id, node=spec.node_id)

    def leave(self, host_ids: Collection[str]) -> None:
        """Let hosts leave as soon as no table names them any more: whoever plans the placements empties them."""
        with self._change:
            self._save(to_leave(self._changeable(), host_ids), self._repair)

    def drain(self, node_ids: Collection[str], *, drained: bool) -> None:
        """Place nothing on these nodes any more, or again."""
        with self._change:
            deployment = self._required()
            kept = [node for node in deployment.limits.drained if node not in node_ids]
            limits = replace(deployment.limits, drained=(*kept, *(node_ids if drained else ())))
            self._save(replace(deployment, limits=limits), self._repair)

    def change(self) -> ChangeStatus:
        """How far the change of the placement is, if there is one."""
        with self._change:
            deployment = self._required()
            following = deployment.following
            loading = [
                host_id
                for host_id, said in self._said.items()
                if said.holds is not None and said.holds.adopting
            ]
            return ChangeStatus(
                following.reason if following is not None else "",
                tuple(loading),
                deployment.leaving,
                tuple(h for h, host in self._repair.hosts.items() if host.phase is not Phase.READY),
                self.abandoned,
                self._repair.epoch,
            )

    def snapshot(self) -> Snapshot | None:
        """What a planner needs; None before every host was ready once, or without a deployment."""
        with self._change:
            deployment, state = self._deployment, self._repair
            if deployment is None or not state.repairing or state.nodes is None:
                return None
            costs = {host_id: said.cost for host_id, said in self._said.items() if said.cost is not None}
            return Snapshot(deployment, dict(state.hosts), state.nodes.living, costs)

    def stop(self) -> None:
        """End every host and forget the deployment; a `publish` that waits ends with an error."""
        with self._change:
            # First, so that a `publish` that sees a host die knows why.
            running, self._running, self._deployment = self._running, {}, None
            self._repair = Repair({})
            self._lacking.clear()
            self._said.clear()
            self._change.notify_all()
            for host_id, host in running.items():
                try:
                    host.stop()
                except Exception as error:
                    # One that can't be ended must not keep the others running.
                    log.warning("host not ended", host=host_id, reason=str(error))
            self._store.save(b"")

    def _supervise(self, period_s: float) -> None:
        while not self._closed.wait(self._pause(period_s)):
            try:
                self.look()
            except Exception:
                # The store or Ray may be away for a moment; without this thread nothing is repaired any more.
                log.exception("supervision failed")

    def _pause(self, period_s: float) -> float:
        loading = any(host.phase is Phase.STARTING for host in self._repair.hosts.values())
        return min(period_s, _EAGER_S) if loading else period_s

    def _feed(self, seen: Observation) -> None:
        """Let the state machine see something, and do what it says."""
        with self._change:
            if self._deployment is None:
                return
            state, actions = repair.step(self._wanted(), self._repair, seen, self._clock())
            if state is self._repair and not actions:
                return
            deployment, known = self._deployment, self._repair.hosts
            for action in actions:
                if isinstance(action, Publish):
                    table = PlacementTable.from_json(deployment.table).next_epoch(hosts=action.hosts)
                    assert table.epoch == action.epoch
                    measured = {h: said.cost for h, said in self._said.items() if said.cost is not None}
                    table = replace(table, costs={**table.costs, **measured})
                    deployment = replace(deployment, table=table.to_json())
            if replace(state, nodes=None) != replace(self._repair, nodes=None):
                self._save(deployment, state)
            self._repair = state
            for host_id, host in state.hosts.items():
                if host.phase not in RUNNING or host.generation != known[host_id].generation:
                    # What is at hand is of a launch that is over.
                    self._running.pop(host_id, None)
                    self._said.pop(host_id, None)
            for action in actions:
                if isinstance(action, Launch):
                    self._relaunch(action)
                elif isinstance(action, End):
                    self._end(action)

    def _reconcile(self) -> None:
        """Bring what hosts hold nearer to what the placements say."""
        with self._change:
            deployment, state = self._deployment, self._repair
            if deployment is None or not state.repairing:
                return
            in_use = self._in_use.everywhere(state.epoch, self._clock())
            hosts = {
                host_id: self._holds(host_id) if host.phase is Phase.READY else None
                for host_id, host in state.hosts.items()
            }
            seen = deployment.table, deployment.following, deployment.leaving, in_use, hosts
            if seen == self._settled:
                return
            table = _read_table(deployment.table)
            actions = todo(table.experts, deployment.following, hosts, deployment.leaving, in_use=in_use)
            for action in actions:
                self._do(action)
            self._settled = seen if not actions else None

    def _do(self, action: Todo) -> None:
        assert self._deployment is not None
        deployment, state = self._deployment, self._repair
        if isinstance(action, Adopt):
            bandwidth = int(deployment.placement.rebalance.bandwidth)
            self._running[action.host_id].adopt(action.experts, action.number, bandwidth)
        elif isinstance(action, Flip):
            assert deployment.following is not None
            log.info("placement changed", epoch=state.epoch + 1, reason=deployment.following.reason)
            self._save(flipped(deployment), replace(state, epoch=state.epoch + 1))
        elif isinstance(action, Abandon):
            log.warning("placement not changed", reason=action.reason)
            self.abandoned = action.reason
            self._save(replace(deployment, following=None), state)
        else:
            hosts = {host_id: host for host_id, host in state.hosts.items() if host_id != action.host_id}
            self._save(left(deployment, action.host_id), replace(state, hosts=hosts, epoch=state.epoch + 1))
            self._said.pop(action.host_id, None)
            host = self._running.pop(action.host_id, None)
            log.info("host leaves", host=action.host_id)
            try:
                if host is not None:
                    host.stop()
            except Exception as error:
                log.warning("host not ended", host=action.host_id, reason=str(error))

    def _holds(self, host_id: str) -> HostHolds | None:
        said = self._said.get(host_id)
        return said.holds if said is not None and host_id in self._running else None

    def _changeable(self) -> Deployment:
        """The deployment. HostError before every host was ready once."""
        deployment = self._required()
        if not self._repair.repairing:
            raise HostError("the hosts are still starting", "try again when `expertmesh status` says ready")
        return deployment

    def _relaunch(self, action: Launch) -> None:
        spec = action.spec
        # It may be on another node now.
        self._lacking.discard(spec.host_id)
        log.info("host launched again", host=spec.host_id, launch=action.generation, node=spec.node_id)
        try:
            self._running[spec.host_id] = self._hosts.launch(spec, action.generation)
        except Exception as error:
            self._find(spec.host_id, action.generation, f"not launched: {in_short(error)}")

    def _find(self, host_id: str, generation: int, reason: str) -> None:
        """Take up a launch of which nothing is at hand; it is dead for this reason if there is none.

        A launch may have succeeded though its answer was lost. Where nobody can say, the next look asks again.
        """
        try:
            found = self._hosts.find(host_id, generation)
        except Exception as error:
            log.warning("host not found", host=host_id, reason=in_short(error))
            return
        if found is not None:
            self._running[host_id] = found
        else:
            self._feed(HostDead(host_id, generation, reason))

    def _end(self, action: End) -> None:
        try:
            self._running[action.host_id].stop()
        except Exception as error:
            log.warning("host not ended", host=action.host_id, reason=str(error))

    def _launch_missing(self) -> None:
        """Launch hosts that don't run, before the first was ready. What a launch raises is raised."""
        assert self._deployment is not None
        if self._repair.repairing:
            return
        # One by one: if a launch raises, `stop` must know of those before it.
        for spec in self._deployment.hosts:
            if spec.host_id not in self._running:
                state, launch = repair.launch(self._wanted(), self._repair, spec.host_id, self._clock())
                self._save(self._deployment, state)
                self._running[spec.host_id] = self._hosts.launch(launch.spec, launch.generation)

    def _recover(self) -> None:
        text = self._store.load()
        if not text:
            return
        self._deployment, self._repair = from_document(text, self._clock())
        for host_id, host in self._repair.hosts.items():
            if host.phase in RUNNING:
                found = self._hosts.find(host_id, host.generation)
                if found is not None:
                    self._running[host_id] = found
        with self._change:
            self._launch_missing()
        self.look()

    def _wanted(self) -> Wanted:
        deployment = self._required()
        specs = {spec.host_id: spec for spec in deployment.hosts}
        return Wanted(specs, deployment.limits, self._backoff)

    def _save(self, deployment: Deployment, state: Repair) -> None:
        """Before anything is done: a successor that knew less would launch again, or use an epoch twice."""
        self._store.save(to_document(deployment, state, self._clock()))
        self._deployment, self._repair = deployment, state
        self._change.notify_all()

    def _unless_ended(self, asked: Deployment) -> Deployment:
        """The deployment as it is now; HostError if it is not `asked` any more."""
        now = self._deployment
        if now is None or not now.same(asked):
            raise HostError(
                f"{asked.served_name} was ended while its hosts were starting",
                "start it again if it is wanted",
            )
        return now

    def _required(self) -> Deployment:
        if self._deployment is None:
            raise HostError("nothing is deployed on this cluster", "start it with `expertmesh serve`")
        return self._deployment
