"""The controller as a Ray actor, with its document in Ray's own key-value store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.experimental import internal_kv

from actors.ray_hosts import RayHosts
from cluster.controller import Controller, Deployment
from cluster.messages import HostProgress, HostReport

NAME = "controller"


# Ray's types know neither max_concurrency nor groups. Threads, so that status answers while a publish waits;
# some for publish alone, since each engine that starts keeps one waiting, and `stop` must find one free.
_actor: Any = ray.remote(  # type: ignore[call-overload]
    max_restarts=-1, max_task_retries=-1, max_concurrency=8, concurrency_groups={"publish": 4}, num_cpus=0
)


class KvStore:
    """A document in the cluster's key-value store: it lives as long as the cluster."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def load(self) -> bytes | None:
        return internal_kv._internal_kv_get(self._key)

    def save(self, document: bytes) -> None:
        internal_kv._internal_kv_put(self._key, document, overwrite=True)


@_actor
class ControllerActor:
    """Ray's view of a Controller."""

    def __init__(self, namespace: str) -> None:
        self._controller = Controller(RayHosts(namespace), KvStore(f"expertmesh:{namespace}:deployment"))

    def deploy(self, deployment: Deployment) -> None:
        self._controller.deploy(deployment)

    def progress(self) -> list[HostProgress]:
        return self._controller.progress()

    @ray.method(concurrency_group="publish")
    def publish(self, timeout_s: float) -> str:
        return self._controller.publish(timeout_s)

    def table(self) -> str:
        return self._controller.table()

    def reports(self) -> Mapping[str, HostReport | str]:
        return self._controller.reports()

    def deployment(self) -> Deployment | None:
        return self._controller.deployment()

    def stop(self) -> None:
        self._controller.stop()


def published_table(namespace: str, timeout_s: float) -> str:
    """JSON of the table, once every host is ready; called in the router's process."""
    controller: Any = ray.get_actor(NAME, namespace=namespace)
    answer: Any = controller.publish.remote(timeout_s)
    return str(ray.get(answer, timeout=timeout_s + 30))


def get_or_start(namespace: str) -> Any:
    """The cluster's controller; the first caller starts it."""
    actor: Any = ControllerActor
    return actor.options(name=NAME, namespace=namespace, lifetime="detached", get_if_exists=True).remote(
        namespace
    )


def find(namespace: str) -> Any:
    """The running controller, or None."""
    try:
        return ray.get_actor(NAME, namespace=namespace)
    except ValueError:
        return None
