"""A mesh to be hurt: its server, its processes, what it says of itself."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from actors.failpoints import VARIABLE
from cluster.auth import ensure_token, token_path
from cluster.config import Config
from cluster.errors import ConfigError, ExpertmeshError
from cluster.experts_report import ExpertsReport
from cluster.messages import HostAddress
from cluster.ray_cluster import connected
from cluster.table import PlacementTable
from workloads.bench.chaos_plan import Planned
from workloads.bench.chaos_scenario import Cluster
from workloads.bench.chaos_server import MARK, Left, ServerChild, uninterrupted
from workloads.bench.chaos_statistics import Table
from workloads.bench.ray_nodes import RayNodes, Worker

# Longer than the engine's own readiness probe may take.
_READY_S = 35.0
_STATS_S = 2.0
_CALL_S = 15.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}
_TITLES = {"controller": "ray::ControllerActor", "router": "ray::ServeReplica:expertmesh:router"}


class Mesh:
    """A served model on a cluster of its own. Needs a connection to that cluster, see `started`."""

    def __init__(
        self,
        child: ServerChild,
        namespace: str,
        name: str,
        vocabulary: int,
        nodes: RayNodes | None = None,
        disconnect: Callable[[], None] = lambda: None,
    ) -> None:
        """`disconnect` closes the connection to the cluster."""
        self.url, self.name, self.vocabulary = child.url, name, vocabulary
        self._child, self._namespace, self._nodes = child, namespace, nodes
        self._disconnect = disconnect
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
        found = self._addresses()
        if found is None:
            return None
        return {host_id: address.pid if address else None for host_id, address in found.items()}

    def zones(self) -> set[str]:
        """Zones of the nodes on which hosts are; empty on a cluster without any."""
        import ray

        zone = {node["NodeID"]: (node.get("Labels") or {}).get("zone") for node in ray.nodes()}
        found = {zone.get(address.node_id) for address in (self._addresses() or {}).values() if address}
        return {name for name in found if name}

    def table(self) -> Table | None:
        """Epoch and digest of the controller's table; None if it does not answer."""
        text = self._ask("table")
        if not text:
            return None
        table = PlacementTable.from_json(text[0])
        return table.epoch, table.digest

    def pids(self, planned: tuple[Planned, ...]) -> dict[str, frozenset[int]]:
        """The pids of every target, looked up before the first fault. ExpertmeshError if one isn't there."""
        hosts = self.hosts() or {}
        found: dict[str, frozenset[int]] = {}
        self._child.family()  # so that what they leave is known to be theirs
        for event in planned:
            if event.changes:
                found[event.target] = frozenset()
                continue
            if event.node:
                assert self._nodes is not None
                pids = {process.pid for process in self._nodes.processes(event.node)}
            else:
                pid = hosts.get(event.host) if event.host else self._pid(event.process or "")
                pids = {pid} if pid is not None else set()
            if not pids:
                raise ExpertmeshError(f"{event.target} does not run, it can't be hurt", "run it again")
            found[event.target] = frozenset(pids)
        return found

    def strike(self, event: Planned, pids: frozenset[int]) -> int:
        """Carry out an event; when, in nanoseconds of CLOCK_MONOTONIC."""
        if event.changes:
            return self._change(event)
        if event.node or event.process == "head":
            return self._strike_node(event)
        if event.action in _SIGNALS:
            return self._child.signal(next(iter(pids)), _SIGNALS[event.action])
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

    def changing(self) -> bool:
        """Whether a change of the placement is under way, or the controller does not say."""
        answer = self._ask("change")
        if not answer:
            return True
        (change,) = answer
        return bool(change.reason or change.loading or change.leaving or change.absent)

    def experts(self) -> ExpertsReport | None:
        """The controller's account of the experts; None if it does not answer."""
        answer = self._ask("experts")
        return answer[0] if answer else None

    def call(self, method: str, *arguments: object) -> Any:
        """The controller's answer. The ExpertmeshError that it raises, or Ray's if it is not there."""
        import ray

        from actors import ray_controller

        try:
            return ray.get(
                getattr(ray_controller.find(self._namespace), method).remote(*arguments), timeout=_CALL_S
            )
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ExpertmeshError):
                raise error.cause from None
            raise

    def restore(self) -> None:
        """Start the nodes again that were killed, so that the next run finds as many."""
        if self._nodes is not None:
            self._nodes.start_workers()

    def end(self) -> Left:
        """End it; what outlived it."""
        with uninterrupted():
            # Before the cluster ends: a driver that says goodbye to a raylet that is dead is ended by Ray at once,
            # without an exception, and takes all that was measured with it.
            self._disconnect()
            return self._child.end()

    def _change(self, event: Planned) -> int:
        """Have the controller make an operator's change; it goes on after this."""
        import ray

        from actors import ray_controller

        controller = ray_controller.find(self._namespace)
        now_ns = time.monotonic_ns()
        arguments = {
            "scale": (event.group, int(event.value or 0)),
            "drain": (self._node_of(event.node or ""),),
            "undrain": (self._node_of(event.node or ""),),
            "rebalance": (),
        }[event.action]
        ray.get(getattr(controller, event.action).remote(*arguments), timeout=_CALL_S)
        return now_ns

    def _node_of(self, zone: str) -> str:
        import ray

        found = [
            n["NodeID"] for n in ray.nodes() if n["Alive"] and (n.get("Labels") or {}).get("zone") == zone
        ]
        return str(found[0]) if found else ""

    def _strike_node(self, event: Planned) -> int:
        nodes = self._nodes
        assert nodes is not None
        if event.process == "head":
            return nodes.kill_control_plane() if event.action == "kill" else nodes.start_control_plane()
        act = {"kill": nodes.kill_node, "cut": nodes.cut, "heal": nodes.heal}[event.action]
        return act(event.node or "")

    def _addresses(self) -> dict[str, HostAddress | None] | None:
        answer = self._ask("deployment", "reports")
        if not answer or answer[0] is None:
            return None
        deployment, reports = answer
        return {
            spec.host_id: getattr(reports.get(spec.host_id), "address", None) for spec in deployment.hosts
        }

    def _ask(self, *methods: str) -> list[Any] | None:
        """What the controller answers; None if it doesn't."""
        import ray

        from actors import ray_controller

        try:
            controller = self._controller = self._controller or ray_controller.find(self._namespace)
            return ray.get([getattr(controller, method).remote() for method in methods], timeout=_CALL_S)
        except Exception:
            # Whatever Ray says of a controller that died: the next call looks for its successor.
            self._controller = None
            return None

    def _pid(self, process: str) -> int | None:
        if process == "head":
            return self._nodes.control_plane_pid() if self._nodes else None
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
def started(config: Config, name: str, vocabulary: int, cluster: Cluster | None = None) -> Iterator[Mesh]:
    """A ready mesh on a cluster of its own; ended with the block, however that ends.

    Without `cluster` the server starts one of one node for itself. Raises an ExpertmeshError if it can't start.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-chaos-"))
        nodes = None
        if cluster is not None:
            token = token_path(config.ray.token_path)
            ensure_token(token)
            workers = [Worker(node.zone, node.cpus, namespace=node.namespace) for node in cluster.nodes]
            nodes = RayNodes(token, workers, {MARK: uuid.uuid4().hex, VARIABLE: "1"})
            stack.callback(_close, nodes)
            nodes.start(head_cpus=cluster.head_cpus, persistent=cluster.persistent)
            ray_config = {"address": nodes.address, "token_path": str(token)}
            config = config.model_copy(update={"ray": config.ray.model_copy(update=ray_config)})
        child = ServerChild(Path(folder), config, nodes)
        stack.callback(_end, child)
        run = child.wait_ready()
        settings = config.ray.model_copy(
            update={"address": run.ray_address, "namespace": run.namespace, "token_path": run.token_path}
        )
        stack.enter_context(connected(settings))
        import ray

        yield Mesh(child, run.namespace, name, vocabulary, nodes, ray.shutdown)


def own_cluster(config: Config) -> None:
    """ConfigError unless the configuration leaves the cluster to us."""
    if config.ray.address != "local":
        raise ConfigError(
            f"ray.address is {json.dumps(config.ray.address)}, and chaos kills what it finds there",
            "leave it at local: chaos runs start clusters of their own",
        )


def _close(nodes: RayNodes) -> None:
    with uninterrupted():
        nodes.close()


def _end(child: ServerChild) -> None:
    with uninterrupted():
        child.end()
