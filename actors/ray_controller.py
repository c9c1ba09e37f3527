"""The controller as a Ray actor, with its document in Ray's own key-value store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import structlog
from ray.experimental import internal_kv

from actors.ray_hosts import RayHosts, RayNodes
from actors.ray_node_provider import RayNodeProvider
from cluster import niceness
from cluster.autoscaler import Autoscaler, AutoscaleStatus
from cluster.canary import Observed, Trial
from cluster.changes import ChangeStatus
from cluster.controller import Controller, Deployment
from cluster.experts_report import EXPERTS, ExpertsReport, experts_report
from cluster.messages import HostProgress, HostReport, Sources, Traffic
from cluster.moves import Proposal
from cluster.rebalancer import Rebalancer
from cluster.repair_state import HostStatus
from cluster.traffic import Routing
from cluster.version_changes import Promoted, Staged, VersionsStatus, crash_at

if TYPE_CHECKING:
    from actors.admin_server import AdminServer

NAME = "controller"
# How often nodes and hosts are looked at: a round takes a few ms, and the engines don't wait for it to do without
# a host that fails.
_PERIOD_S = 0.5
# A controller that is being replaced answers after some seconds, or is asked again.
_CALL_S = 15.0
# How often somebody looks whether it is time to plan anew.
_LOOK_S = 1.0

log = structlog.get_logger()

# Of a router's process, by namespace.
_found: dict[str, Any] = {}


# Ray's types know neither max_concurrency nor groups. Threads, so that status answers while a publish waits;
# some for publish and next_table alone, since each engine keeps one waiting, and `stop` must find one free.
_actor: Any = ray.remote(  # type: ignore[call-overload]
    max_restarts=-1,
    max_task_retries=-1,
    max_concurrency=8,
    concurrency_groups={"publish": 4, "watch": 4},
    num_cpus=0,
)


class KvStore:
    """A document in the cluster's key-value store: it lives as long as the cluster."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def load(self) -> bytes | None:
        return internal_kv._internal_kv_get(self._key)

    def save(self, document: bytes) -> None:
        internal_kv._internal_kv_put(self._key, document, overwrite=True)


class GroupScaler:
    """The rebalancer as the autoscaler uses it."""

    def __init__(self, rebalancer: Rebalancer) -> None:
        self._rebalancer = rebalancer

    def scale(self, group: str, count: int) -> None:
        self._rebalancer.scale(group, count)


@_actor
class ControllerActor:
    """Ray's view of a Controller."""

    def __init__(self, namespace: str) -> None:
        niceness.usual()
        store = KvStore(f"expertmesh:{namespace}:deployment")
        self._controller = Controller(RayHosts(namespace, partial(sources, namespace)), store, RayNodes())
        self._controller.supervise(_PERIOD_S)
        self._rebalancer = Rebalancer(self._controller)
        self._autoscaler: tuple[str, Autoscaler] | None = None
        self._admin: AdminServer | None = None
        self._administering = threading.Lock()
        # A predecessor's, if it was killed.
        self._administer(patient=True)
        threading.Thread(target=self._rebalance, name="expertmesh-rebalance", daemon=True).start()

    def deploy(self, deployment: Deployment) -> None:
        self._controller.deploy(deployment)
        self._administer()

    def progress(self) -> list[HostProgress]:
        return self._controller.progress()

    @ray.method(concurrency_group="publish")
    def publish(self, timeout_s: float) -> str:
        return self._controller.publish(timeout_s)

    @ray.method(concurrency_group="watch")
    def next_table(
        self, after_epoch: int, timeout_s: float, engine: str = "", running: Collection[str] = ()
    ) -> str:
        return self._controller.next_table(after_epoch, timeout_s, engine, running)

    def table(self) -> str:
        return self._controller.table()

    def states(self) -> list[HostStatus]:
        return self._controller.states()

    def reports(self) -> Mapping[str, HostReport | str]:
        return self._controller.reports()

    def sources(self, host_id: str) -> Sources:
        return self._controller.sources(host_id)

    def deployment(self) -> Deployment | None:
        return self._controller.deployment()

    def count(self, traffic: Traffic) -> Routing | None:
        return self._rebalancer.count(traffic)

    def experts(self) -> ExpertsReport:
        return experts_report(self._controller, self._rebalancer)

    def propose(self) -> Proposal:
        return self._rebalancer.propose(must=True, explain=True)

    def rebalance(self) -> Proposal:
        return self._rebalancer.rebalance()

    def drain(self, node: str) -> list[str]:
        return self._rebalancer.drain(node)

    def undrain(self, node: str) -> None:
        self._rebalancer.undrain(node)

    def scale(self, group: str, count: int) -> tuple[list[str], list[str]]:
        return self._rebalancer.scale(group, count)

    def change(self) -> ChangeStatus:
        return self._controller.changes.change()

    def versions(self) -> VersionsStatus:
        return self._controller.versions.status()

    def stage(self, name: str) -> Staged:
        return self._controller.versions.stage(name)

    def unstage(self, name: str) -> None:
        self._controller.versions.unstage(name)

    def promote(self, name: str, author: str, reason: str, continue_running: bool | None) -> Promoted:
        return self._controller.versions.promote(
            name, author=author, reason=reason, continue_running=continue_running
        )

    def rollback(self, author: str, reason: str) -> Promoted:
        return self._controller.trials.rollback(author=author, reason=reason)

    def crash_at(self, step: str) -> None:
        crash_at(step)

    def try_out(self, trial: Trial) -> None:
        self._controller.trials.try_out(trial)

    def share_out(self, shares: Mapping[str, Mapping[str, float]]) -> int:
        return self._controller.trials.share_out(shares)

    def observe(self, seen: Observed) -> None:
        self._controller.trials.observe(seen)

    def _administer(self, *, patient: bool = False) -> None:
        """Serve the admin API of what is deployed, if it is to have one, and no other's."""
        with self._administering:
            deployment = self._controller.deployment()
            wanted = deployment.admin if deployment is not None else None
            if self._admin is not None and self._admin.settings != wanted:
                self._admin.close()
                self._admin = None
            if wanted is not None and self._admin is None:
                # Here, since routers, hosts and commands import this module too.
                from actors.admin_api import admin_app
                from actors.admin_server import AdminServer

                self._admin = AdminServer(admin_app(self._controller, wanted), wanted, patient=patient)

    def autoscaled(self) -> tuple[AutoscaleStatus, ...]:
        return self._autoscaler[1].statuses() if self._autoscaler is not None else ()

    def _autoscale(self) -> None:
        """Scale the groups that want it; a deployment that ended asks for no nodes any more."""
        deployment = self._controller.deployment()
        run = deployment.run if deployment is not None else ""
        if self._autoscaler is not None and self._autoscaler[0] != run:
            self._autoscaler[1].close()
            self._autoscaler = None
        if deployment is None or all(group.autoscale is None for group in deployment.groups):
            return
        if self._autoscaler is None:
            scaler = Autoscaler(
                deployment.groups, self._rebalancer.loads, GroupScaler(self._rebalancer), RayNodeProvider()
            )
            self._autoscaler = run, scaler
        self._autoscaler[1].look()

    def _rebalance(self) -> None:
        """Take in nodes that joined and look at the placement, on cores that nobody else wants."""
        # Of this thread alone, and of those that the planner starts from it.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while True:
            time.sleep(_LOOK_S)
            # One that fails must not keep the others from their turn.
            for look in (self._rebalancer.take_in, self._rebalancer.look, self._autoscale):
                try:
                    look()
                except Exception:
                    log.exception("rebalancing failed")

    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        if self._autoscaler is not None:
            # Here, since this process may end before its thread looks: Ray would keep nodes for nobody.
            self._autoscaler[1].close()
        self._controller.stop()
        self._administer()


def published_table(namespace: str, timeout_s: float) -> str:
    """JSON of the table, once every host is ready; called in the router's process."""
    controller: Any = ray.get_actor(NAME, namespace=namespace)
    answer: Any = controller.publish.remote(timeout_s)
    return str(ray.get(answer, timeout=timeout_s + 30))


def next_table(namespace: str, after_epoch: int, timeout_s: float, engine: str, running: list[str]) -> str:
    """JSON of the first table after an epoch, or nothing in time; called in the router's process. `engine` is the
    replica's name.
    """
    # Looked up once: the cluster's control plane would be in every promotion's way.
    controller: Any = _found.get(namespace) or ray.get_actor(NAME, namespace=namespace)
    try:
        answer: Any = controller.next_table.remote(after_epoch, timeout_s, engine, running)
        table = str(ray.get(answer, timeout=timeout_s + 10))
    except Exception:
        # The controller may be gone for good: a new one has the same name, and is found by the next call.
        _found.pop(namespace, None)
        raise
    _found[namespace] = controller
    return table


def report_traffic(namespace: str, traffic: Traffic) -> Routing | None:
    """Tell the controller what an engine counted, and hear what all engines' choices are like; called in the router's
    process.
    """
    controller: Any = ray.get_actor(NAME, namespace=namespace)
    answer: Any = ray.get(controller.count.remote(traffic), timeout=_CALL_S)
    return answer


def observe(namespace: str, seen: Observed) -> None:
    """Tell the controller what a router saw of a version on trial; called in the router's process."""
    controller: Any = ray.get_actor(NAME, namespace=namespace)
    ray.get(controller.observe.remote(seen), timeout=_CALL_S)


def experts_json(namespace: str) -> str:
    """JSON of all that is known of the experts; called in the router's process."""
    controller: Any = ray.get_actor(NAME, namespace=namespace)
    answer: Any = ray.get(controller.experts.remote(), timeout=_CALL_S)
    return EXPERTS.dump_json(answer).decode()


def sources(namespace: str, host_id: str) -> Sources:
    """Where a host may copy its experts from; called in the host's process."""
    controller: Any = ray.get_actor(NAME, namespace=namespace)
    answer: Any = ray.get(controller.sources.remote(host_id), timeout=_CALL_S)
    return answer


def get_or_start(namespace: str, selector: Mapping[str, str] | None = None) -> Any:
    """The cluster's controller; the first caller starts it, on a node with these labels or else on its own."""
    actor: Any = ControllerActor
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return actor.options(
        name=NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        # Anywhere else it might be lost or cut off with a node of hosts, when it has most to do. By label and not
        # by soft affinity, with which it was seen elsewhere on a cluster that had just started.
        label_selector=dict(selector or here),
    ).remote(namespace)


def find(namespace: str) -> Any:
    """The running controller, or None."""
    try:
        return ray.get_actor(NAME, namespace=namespace)
    except ValueError:
        return None
