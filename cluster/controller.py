"""The controller: starts the expert hosts, repairs them, owns the placement table, answers who is where.

What is to be done is decided in `cluster.repair`; here it is done. Its state is one JSON document in a store that
outlives it; a new controller reads it and finds the hosts again. Ray comes in through `cluster.ports`, so unit
tests need none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import structlog

from cluster import repair, rounds
from cluster.changes import Changes
from cluster.deployment import Deployment, complete
from cluster.errors import HostError
from cluster.in_use import TablesInUse
from cluster.ledger import Ledger
from cluster.messages import HostProgress, HostReport, Sources
from cluster.ports import Hosts, Nodes, Store
from cluster.repair_state import (
    RUNNING,
    Backoff,
    End,
    HostDead,
    HostReady,
    HostStatus,
    Launch,
    NodesSeen,
    Observation,
    Phase,
    Publish,
    Tick,
    Wanted,
    planned,
    sources,
    statuses,
)
from cluster.rounds import Rounds, in_short
from cluster.table import PlacementTable
from cluster.trials import Trials
from cluster.version_changes import VersionChanges

log = structlog.get_logger()

# How long a host that is asked how it is may take, and for how long the others' repair waits for it.
_PATIENCE_S = 5.0
_ROUND_S = 0.5
# How often `publish` looks for itself, where nothing supervises.
_WAIT_S = 0.2
# While hosts load somebody waits for them.
_EAGER_S = 0.2


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
        self._ledger = Ledger(store, clock)
        self._nodes = nodes
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._rounds = Rounds(_PATIENCE_S, _ROUND_S)
        self._looking = threading.Lock()
        self._supervised = False
        self._closed = threading.Event()
        # Hosts that load and asked for sources. Not saved: they ask again and again.
        self._lacking: set[str] = set()
        self._in_use = TablesInUse(self._clock(), silence_s)
        self.changes = Changes(self._ledger, self._in_use)
        """What an operator, or a planner, may change of the placement."""
        self.versions = VersionChanges(self._ledger, self.changes, self._in_use)
        """What an operator may change of the model's versions."""
        self.trials = Trials(self._ledger, self.versions)
        """Versions that get a share of requests first."""
        self._recover()

    def deploy(self, deployment: Deployment) -> None:
        """Start every host of `deployment`; returns while they load. HostError if another is deployed already.

        The same one may be deployed again: Ray repeats a call whose answer was lost with the controller.
        """
        with self._ledger.change:
            if self._ledger.deployment is None:
                specs = {spec.host_id: spec for spec in deployment.hosts}
                self._ledger.save(
                    deployment, planned(specs, PlacementTable.from_json(deployment.table).epoch)
                )
            elif not self._ledger.deployment.same(deployment):
                raise HostError(
                    f"{self._ledger.deployment.served_name} is deployed on this cluster already",
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
            if self._ledger.deployment is None:
                return
            at = self._clock()
            try:
                living = self._nodes.living()
            except Exception as error:
                log.warning("nodes not seen", reason=str(error))
            else:
                self._feed(NodesSeen(at, living))
            with self._ledger.change:
                for host_id, known in self._ledger.repair.hosts.items():
                    if known.phase in RUNNING and host_id not in self._ledger.running:
                        self._find(host_id, known.generation, "no process of it was found")
                running = dict(self._ledger.running)
            for host_id, (host, answer) in self._rounds.ask(running).items():
                with self._ledger.change:
                    # Another deployment's host may have the name meanwhile.
                    if answer is not None and self._ledger.running.get(host_id) is host:
                        if isinstance(answer, HostReady):
                            self._ledger.said[host_id] = answer
                            self._ledger.heard[host_id] = self._clock()
                        self._feed(answer)
            self._feed(Tick())
            self.changes.reconcile()
            self.versions.look()
            self.trials.look()
        finally:
            self._looking.release()

    def progress(self) -> list[HostProgress]:
        """How far each host is with loading, and why one can't be loaded."""
        with self._ledger.change:
            specs = self._ledger.deployment.hosts if self._ledger.deployment else ()
            running, hosts = dict(self._ledger.running), self._ledger.repair.hosts
        return rounds.progress(specs, running, hosts)

    def publish(self, timeout_s: float) -> str:
        """The table's JSON with the hosts' addresses, once every host was ready; every router that starts asks.

        Later, while a host is being repaired, the table without it, as soon as some host has each expert.
        HostError if that is not so in time, a host can't start, or the deployment is stopped meanwhile.
        """
        with self._ledger.change:
            asked = self._ledger.required()
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._supervised:
                self.look()
            with self._ledger.change:
                deployment = self._unless_ended(asked)
                if self._ledger.repair.repairing and complete(PlacementTable.from_json(deployment.table)):
                    return deployment.table
                late = [
                    (h, host)
                    for h, host in self._ledger.repair.hosts.items()
                    if host.phase is not Phase.READY
                ]
                for host_id, host in late:
                    if not self._ledger.repair.repairing and host.phase is not Phase.STARTING and host.reason:
                        raise HostError(f"host {host_id} could not start: {host.reason}")
                left = deadline - time.monotonic()
                if left <= 0:
                    host_id, host = late[0]
                    why = f": {host.reason}" if host.reason else ""
                    raise HostError(f"host {host_id} was not ready within {timeout_s:g} s{why}")
                self._ledger.change.wait(min(left, _WAIT_S))

    def next_table(
        self, after_epoch: int, timeout_s: float, engine: str = "", running: Collection[str] = ()
    ) -> str:
        """JSON of the current table as soon as its epoch is later than `after_epoch`; "" if it is not in time.

        `engine` names who asks, and uses `after_epoch` meanwhile; `running` are the manifests of its requests.
        """
        with self._ledger.change:
            if engine:
                self._in_use.heard(engine, after_epoch, self._clock(), running)
                self._ledger.change.notify_all()
            later = self._ledger.change.wait_for(
                lambda: self._ledger.deployment is not None and self._ledger.repair.epoch > after_epoch,
                timeout_s,
            )
            return self._ledger.deployment.table if later and self._ledger.deployment is not None else ""

    def table(self) -> str:
        """JSON of the current table; HostError if nothing is deployed."""
        return self._ledger.required().table

    def states(self) -> list[HostStatus]:
        """Every host with its phase, crashes, the reason and when it is tried next."""
        with self._ledger.change:
            return statuses(self._ledger.repair, self._clock())

    def reports(self) -> Mapping[str, HostReport | str]:
        """Per host its report, or why there is none."""
        with self._ledger.change:
            running, hosts = dict(self._ledger.running), self._ledger.repair.hosts
        return rounds.reports(running, hosts)

    def sources(self, host_id: str) -> Sources:
        """Where a host may copy its experts from that loads on a node without the model's folder."""
        with self._ledger.change:
            self._lacking.add(host_id)
            return sources(self._ledger.repair, host_id, self._lacking)

    def deployment(self) -> Deployment | None:
        """What is deployed."""
        return self._ledger.deployment

    def stop(self) -> None:
        """End every host and forget the deployment; a `publish` that waits ends with an error."""
        with self._ledger.change:
            # First, so that a `publish` that sees a host die knows why.
            running = self._ledger.clear()
            self._lacking.clear()
            for host_id, host in running.items():
                try:
                    host.stop()
                except Exception as error:
                    # One that can't be ended must not keep the others running.
                    log.warning("host not ended", host=host_id, reason=str(error))
            self._ledger.forget()

    def _supervise(self, period_s: float) -> None:
        while not self._closed.wait(self._pause(period_s)):
            try:
                self.look()
            except Exception:
                # The store or Ray may be away for a moment; without this thread nothing is repaired any more.
                log.exception("supervision failed")

    def _pause(self, period_s: float) -> float:
        loading = any(host.phase is Phase.STARTING for host in self._ledger.repair.hosts.values())
        return min(period_s, _EAGER_S) if loading else period_s

    def _feed(self, seen: Observation) -> None:
        """Let the state machine see something, and do what it says."""
        with self._ledger.change:
            if self._ledger.deployment is None:
                return
            state, actions = repair.step(self._wanted(), self._ledger.repair, seen, self._clock())
            if state is self._ledger.repair and not actions:
                return
            deployment, known = self._ledger.deployment, self._ledger.repair.hosts
            for action in actions:
                if isinstance(action, Publish):
                    table = PlacementTable.from_json(deployment.table).next_epoch(hosts=action.hosts)
                    assert table.epoch == action.epoch
                    measured = {
                        h: said.cost for h, said in self._ledger.said.items() if said.cost is not None
                    }
                    table = replace(table, costs={**table.costs, **measured})
                    deployment = replace(deployment, table=table.to_json())
            if replace(state, nodes=None) != replace(self._ledger.repair, nodes=None):
                self._ledger.save(deployment, state)
            self._ledger.repair = state
            for host_id, host in state.hosts.items():
                if host.phase not in RUNNING or host.generation != known[host_id].generation:
                    # What is at hand is of a launch that is over.
                    self._ledger.running.pop(host_id, None)
                    self._ledger.said.pop(host_id, None)
            for action in actions:
                if isinstance(action, Launch):
                    self._relaunch(action)
                elif isinstance(action, End):
                    self._end(action)

    def _relaunch(self, action: Launch) -> None:
        spec = action.spec
        # It may be on another node now.
        self._lacking.discard(spec.host_id)
        log.info("host launched again", host=spec.host_id, launch=action.generation, node=spec.node_id)
        try:
            self._ledger.running[spec.host_id] = self._hosts.launch(spec, action.generation)
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
            self._ledger.running[host_id] = found
        else:
            self._feed(HostDead(host_id, generation, reason))

    def _end(self, action: End) -> None:
        try:
            self._ledger.running[action.host_id].stop()
        except Exception as error:
            log.warning("host not ended", host=action.host_id, reason=str(error))

    def _launch_missing(self) -> None:
        """Launch hosts that don't run, before the first was ready. What a launch raises is raised."""
        assert self._ledger.deployment is not None
        if self._ledger.repair.repairing:
            return
        # One by one: if a launch raises, `stop` must know of those before it.
        for spec in self._ledger.deployment.hosts:
            if spec.host_id not in self._ledger.running:
                state, launch = repair.launch(
                    self._wanted(), self._ledger.repair, spec.host_id, self._clock()
                )
                self._ledger.save(self._ledger.deployment, state)
                self._ledger.running[spec.host_id] = self._hosts.launch(launch.spec, launch.generation)

    def _recover(self) -> None:
        if not self._ledger.load():
            return
        for host_id, host in self._ledger.repair.hosts.items():
            if host.phase in RUNNING:
                found = self._hosts.find(host_id, host.generation)
                if found is not None:
                    self._ledger.running[host_id] = found
        with self._ledger.change:
            self._launch_missing()
        self.look()

    def _wanted(self) -> Wanted:
        deployment = self._ledger.required()
        specs = {spec.host_id: spec for spec in deployment.hosts}
        return Wanted(specs, deployment.limits, self._backoff)

    def _unless_ended(self, asked: Deployment) -> Deployment:
        """The deployment as it is now; HostError if it is not `asked` any more."""
        now = self._ledger.deployment
        if now is None or not now.same(asked):
            raise HostError(
                f"{asked.served_name} was ended while its hosts were starting",
                "start it again if it is wanted",
            )
        return now
