"""The controller: starts the expert hosts, owns the placement table, answers who is where.

Its state is one JSON document in a store that outlives it; a new controller reads it and finds the
hosts again. Ray comes in through `Hosts` and `Store`, so unit tests need none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog
from pydantic import TypeAdapter

from cluster.errors import HostError
from cluster.messages import HostAddress, HostProgress, HostReport, HostSpec
from cluster.table import PlacementTable


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is to run: the hosts with their experts, and the empty-addressed table that routes to them."""

    served_name: str
    hosts: tuple[HostSpec, ...]
    table: str
    """JSON of the planned table; its addresses are filled in as hosts come up."""


class Host(Protocol):
    """A running host, as `actors.ray_hosts.RayHost`; a call that takes too long raises TimeoutError."""

    def progress(self, timeout_s: float) -> HostProgress: ...
    def wait_ready(self, timeout_s: float) -> HostAddress: ...
    def report(self, timeout_s: float) -> HostReport: ...
    def stop(self) -> None: ...


class Hosts(Protocol):
    """Starts and finds hosts, as `actors.ray_hosts.RayHosts`."""

    def launch(self, spec: HostSpec) -> Host: ...
    def find(self, host_id: str) -> Host | None: ...


class Store(Protocol):
    """One small document that outlives the controller."""

    def load(self) -> bytes | None: ...
    def save(self, document: bytes) -> None: ...


log = structlog.get_logger()

_DEPLOYMENT = TypeAdapter(Deployment)
# A host that loads answers quickly all the same: loading runs in a thread of its own.
_CALL_TIMEOUT_S = 10.0
# How long one call to a host waits for it to be ready: as soon does `publish` notice that it was stopped.
_WAIT_S = 0.5


class Controller:
    """Owns one deployment. Calls may come from several threads; changes are made one at a time.

    Nothing waits for a host while it holds the lock of changes, so that `stop` is served at any time.
    """

    def __init__(self, hosts: Hosts, store: Store) -> None:
        self._hosts = hosts
        self._store = store
        self._change = threading.Lock()
        self._publishing = threading.Lock()
        self._deployment: Deployment | None = None
        self._running: dict[str, Host] = {}
        self._recover()

    def deploy(self, deployment: Deployment) -> None:
        """Start every host of `deployment`; returns while they load. HostError if another is deployed already.

        The same one may be deployed again: Ray repeats a call whose answer was lost with the controller.
        """
        with self._change:
            if self._deployment is None:
                self._save(deployment)
            elif not _same(self._deployment, deployment):
                raise HostError(
                    f"{self._deployment.served_name} is deployed on this cluster already",
                    "end it with `expertmesh down` first",
                )
            # One by one: if a launch raises, `stop` must know of those before it.
            for spec in deployment.hosts:
                if spec.host_id not in self._running:
                    self._running[spec.host_id] = self._hosts.launch(spec)

    def progress(self) -> list[HostProgress]:
        """How far each host is with loading."""
        specs = self._deployment.hosts if self._deployment else ()
        layers = {spec.host_id: len(spec.experts) for spec in specs}
        states = []
        for host_id, host in list(self._running.items()):
            try:
                states.append(host.progress(_CALL_TIMEOUT_S))
            except TimeoutError:
                # Its process is still starting, for which a busy node may need longer than a call.
                states.append(HostProgress(host_id, 0, layers.get(host_id, 0), ready=False, error=""))
        return states

    def publish(self, timeout_s: float) -> str:
        """Wait for every host, then return the table's JSON with their addresses.

        It is the next epoch if an address changed since the last one: every router that starts asks.
        HostError if a host is not ready in time, or the deployment is stopped meanwhile.
        """
        # One at a time, or the older of two answers of a host could be written last.
        with self._publishing:
            with self._change:
                asked, running = self._required(), dict(self._running)
            deadline = time.monotonic() + timeout_s
            addresses = {}
            for host_id, host in running.items():
                try:
                    addresses[host_id] = self._wait_ready(host, asked, deadline)
                except TimeoutError as error:
                    raise HostError(f"host {host_id} was not ready within {timeout_s:g} s") from error
            with self._change:
                deployment = self._unless_ended(asked)
                current = PlacementTable.from_json(deployment.table)
                if all(current.hosts[host_id] == address for host_id, address in addresses.items()):
                    return deployment.table
                table = current.next_epoch(hosts=addresses).to_json()
                self._save(Deployment(deployment.served_name, deployment.hosts, table))
                return table

    def _wait_ready(self, host: Host, asked: Deployment, deadline: float) -> HostAddress:
        """In short calls, since one can't be called back. TimeoutError past the deadline."""
        while True:
            left = deadline - time.monotonic()
            try:
                return host.wait_ready(max(0.0, min(left, _WAIT_S)))
            except TimeoutError:
                self._unless_ended(asked)
                if left <= _WAIT_S:
                    raise
            except Exception:
                # A host that `stop` ended says that it is dead, which is not what went wrong.
                self._unless_ended(asked)
                raise

    def _unless_ended(self, asked: Deployment) -> Deployment:
        """The deployment as it is now; HostError if it is not `asked` any more."""
        now = self._deployment
        if now is None or not _same(now, asked):
            raise HostError(
                f"{asked.served_name} was ended while its hosts were starting",
                "start it again if it is wanted",
            )
        return now

    def table(self) -> str:
        """JSON of the current table; HostError if nothing is deployed."""
        return self._required().table

    def reports(self) -> Mapping[str, HostReport | str]:
        """Per host its report, or why there is none."""
        reports: dict[str, HostReport | str] = {}
        for host_id, host in list(self._running.items()):
            try:
                reports[host_id] = host.report(_CALL_TIMEOUT_S)
            except Exception as error:
                reports[host_id] = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
        return reports

    def deployment(self) -> Deployment | None:
        """What is deployed."""
        return self._deployment

    def stop(self) -> None:
        """End every host and forget the deployment; a `publish` that waits ends with an error."""
        with self._change:
            # First, so that a `publish` that sees a host die knows why.
            running, self._running, self._deployment = self._running, {}, None
            for host_id, host in running.items():
                try:
                    host.stop()
                except Exception as error:
                    # One that can't be ended must not keep the others running.
                    log.warning("host not ended", host=host_id, reason=str(error))
            self._store.save(b"")

    def _recover(self) -> None:
        document = self._store.load()
        if not document:
            return
        self._deployment = _DEPLOYMENT.validate_json(document)
        for spec in self._deployment.hosts:
            self._running[spec.host_id] = self._hosts.find(spec.host_id) or self._hosts.launch(spec)

    def _save(self, deployment: Deployment) -> None:
        self._store.save(_DEPLOYMENT.dump_json(deployment))
        self._deployment = deployment

    def _required(self) -> Deployment:
        if self._deployment is None:
            raise HostError("nothing is deployed on this cluster", "start it with `expertmesh serve`")
        return self._deployment


def _same(one: Deployment, other: Deployment) -> bool:
    """Whether they are to run the same; their tables differ by the addresses that were filled in."""
    return (one.served_name, one.hosts) == (other.served_name, other.hosts)
