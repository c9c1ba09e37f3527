"""A mesh to be hurt: its server, its processes, what it says of itself."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from cluster.config import Config
from cluster.errors import ConfigError, ExpertmeshError
from cluster.ray_cluster import connected
from workloads.bench.chaos_scenario import Planned
from workloads.bench.chaos_server import Left, ServerChild, uninterrupted

# Longer than the engine's own readiness probe may take.
_READY_S = 35.0
_STATS_S = 2.0
_CALL_S = 15.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}
_TITLES = {"controller": "ray::ControllerActor", "router": "ray::ServeReplica:expertmesh:router"}


class Mesh:
    """A served model on a cluster of its own. Needs a connection to that cluster, see `started`."""

    def __init__(self, child: ServerChild, namespace: str, name: str, vocabulary: int) -> None:
        self.url, self.name, self.vocabulary = child.url, name, vocabulary
        self._child, self._namespace = child, namespace
        self._controller: Any = None
        self._http = httpx.Client(timeout=_STATS_S)

    def stats(self) -> Mapping[str, Any] | None:
        """The engine's counters; None if it does not answer."""
        try:
            answer = self._http.get(f"{self.url}/expertmesh/stats")
            found = answer.json() if answer.status_code == 200 else None
            return found if isinstance(found, dict) else None
        except (httpx.HTTPError, ValueError):
            return None

    def ready(self) -> bool:
        """Whether every host answers the engine and a token flows."""
        try:
            return self._http.get(f"{self.url}/ready", timeout=_READY_S).status_code == 200
        except httpx.HTTPError:
            return False

    def hosts(self) -> dict[str, int | None] | None:
        """Per host its pid, None for one that is not ready; None if the controller does not answer."""
        import ray

        from actors import ray_controller

        try:
            if self._controller is None:
                self._controller = ray_controller.find(self._namespace)
            deployment, reports = ray.get(
                [self._controller.deployment.remote(), self._controller.reports.remote()], timeout=_CALL_S
            )
            found = {spec.host_id: reports.get(spec.host_id) for spec in deployment.hosts}
        except Exception:
            # Whatever Ray says of a controller that died: the next call looks for its successor.
            self._controller = None
            return None
        return {
            host_id: address.pid if (address := getattr(report, "address", None)) else None
            for host_id, report in found.items()
        }

    def pids(self, planned: tuple[Planned, ...]) -> dict[str, int]:
        """The pid of every target, looked up before the first fault. ExpertmeshError if one isn't there."""
        hosts, found = self.hosts() or {}, {}
        self._child.family()  # so that what they leave is known to be theirs
        for event in planned:
            pid = hosts.get(event.host) if event.host else self._pid(event.process or "")
            if pid is None:
                raise ExpertmeshError(f"{event.target} does not run, it can't be hurt", "run it again")
            found[event.target] = pid
        return found

    def strike(self, event: Planned, pid: int) -> int:
        """Carry out an event; when, in nanoseconds of CLOCK_MONOTONIC."""
        if event.action in _SIGNALS:
            return self._child.signal(pid, _SIGNALS[event.action])
        from ray.exceptions import GetTimeoutError, RayActorError

        from actors.ray_hosts import RayHosts

        assert event.host is not None and event.name is not None and event.value is not None
        host = RayHosts(self._namespace).find(event.host)
        if host is None:
            raise ExpertmeshError(f"host {event.host} is not there to be told of {event.name}")
        now_ns = time.monotonic_ns()
        try:
            host.failpoint(event.name, event.value, _CALL_S)
        except (RayActorError, GetTimeoutError):
            if event.name != "hoard_mib":  # of which the host may die before it can answer
                raise
        return now_ns

    def end(self) -> Left:
        """End it; what outlived it."""
        with uninterrupted():
            return self._child.end()

    def _pid(self, process: str) -> int | None:
        if process == "engine":
            stats = self.stats() or {}
            return int(stats["pid"]) if "pid" in stats else None
        if process == "controller" and (pid := self._told_pid()) is not None:
            return pid
        return self._child.titled(_TITLES[process])

    def _told_pid(self) -> int | None:
        import ray

        # Controllers of before this method are found by their process's title.
        ask = getattr(self._controller, "pid", None)
        return int(ray.get(ask.remote(), timeout=_CALL_S)) if ask is not None else None


@contextlib.contextmanager
def started(config: Config, name: str, vocabulary: int) -> Iterator[Mesh]:
    """A ready mesh on a cluster of its own; ended with the block, however that ends.

    Raises an ExpertmeshError if it can't start.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-chaos-"))
        child = ServerChild(Path(folder), config)
        stack.callback(_end, child)
        run = child.wait_ready()
        settings = config.ray.model_copy(
            update={"address": run.ray_address, "namespace": run.namespace, "token_path": run.token_path}
        )
        stack.enter_context(connected(settings))
        yield Mesh(child, run.namespace, name, vocabulary)


def own_cluster(config: Config) -> None:
    """ConfigError unless the configuration leaves the cluster to us."""
    if config.ray.address != "local":
        raise ConfigError(
            f"ray.address is {json.dumps(config.ray.address)}, and chaos kills what it finds there",
            "leave it at local: chaos runs start clusters of their own",
        )


def _end(child: ServerChild) -> None:
    with uninterrupted():
        child.end()
