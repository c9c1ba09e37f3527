"""What the operator promises, whatever answers for Kubernetes.

Unit tests run it over a fake in memory, integration tests over a real API server. A subclass gives the fixture `kube`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import pytest

from cluster.admin_client import HttpMeshAdmin
from cluster.kube import EVENTS, LEASES, NODES, PODS, RAYCLUSTERS, RAYSERVICES, KubeApi, Resource
from cluster.kube_errors import ForbiddenError
from cluster.kube_loop import Operator
from cluster.leader import Leader, LeaseTimes, NotLeaderError
from tests import kube_objects as objects
from tests.kube_objects import KubeRay
from tests.operated_mesh import OperatedMesh, ray_node

DEADLINE_S = 30.0
# Short, so that losing a lease takes no 15 seconds; the API server counts leases in whole ones.
TIMES = LeaseTimes(duration_s=1.0, deadline_s=0.7, retry_s=0.1)
Verb = tuple[str, str, str]
USED: frozenset[Verb] = frozenset(
    {
        *(
            ("ray.io", kind, verb)
            for kind in ("rayservices", "rayclusters")
            for verb in ("list", "watch", "patch")
        ),
        *(("", kind, verb) for kind in ("pods", "nodes") for verb in ("list", "watch")),
        *(("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")),
        ("events.k8s.io", "events", "create"),
    }
)
"""What the operator does, and no more."""


class Kube(Protocol):
    """An API server, and a person who may do all."""

    def api(self, allowed: frozenset[Verb] | None = None) -> KubeApi:
        """The operator's way to it; with `allowed` it may do that alone."""

    def put(self, resource: Resource, body: Any) -> None: ...
    def remove(self, resource: Resource, name: str) -> None: ...
    def object(self, resource: Resource, name: str) -> dict[str, Any]: ...
    def objects(self, resource: Resource) -> list[dict[str, Any]]: ...

    def restart(self) -> None:
        """End it, and start it again with what it had."""


class Scene:
    """A RayService whose cluster has a group a of two pods and a group b of one, on nodes of their own."""

    def __init__(self, kube: Kube) -> None:
        self.kube, self.mesh = kube, OperatedMesh()
        groups = objects.group("a", 2, 1, 4), objects.group("b", 1, 1, 1)
        kube.put(RAYCLUSTERS, objects.cluster("c1", *groups))
        kube.put(RAYSERVICES, objects.service("m", "c1", *groups))
        for name, ip in (("a1", "10.1.0.1"), ("a2", "10.1.0.2"), ("b1", "10.1.0.3")):
            kube.put(NODES, objects.node(f"node-{name}"))
            kube.put(PODS, objects.pod(name, "c1", name[0], ip, f"node-{name}"))
        self.kuberay = KubeRay(kube, "c1")
        self._addresses = iter(range(10, 250))

    def go_on(self, *, schedule: bool = True) -> None:
        """KubeRay, the scheduler and the mesh do their part once."""
        self.kuberay.step()
        pods = {pod["metadata"]["name"]: pod for pod in self.kube.objects(PODS)}
        for name, pod in pods.items():
            if schedule and not pod["status"].get("podIP"):
                ip = f"10.1.0.{next(self._addresses)}"
                group = pod["metadata"]["labels"]["ray.io/group"]
                self.kube.put(PODS, objects.pod(name, "c1", group, ip, "node-a1"))
                self.mesh.nodes += (ray_node(name, group, ip),)
        self.mesh.nodes = tuple(node for node in self.mesh.nodes if node.hostname in pods)
        self.mesh.go_on(1.0)

    def until(self, done: Callable[[], bool], look: Callable[[], object] = lambda: None) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, (self.spec("a"), self.mesh.where(), self.mesh.admin.groups())
            look()
            self.go_on()
            time.sleep(0.02)

    def spec(self, group: str) -> dict[str, Any]:
        specs = self.kube.object(RAYCLUSTERS, "c1")["spec"]["workerGroupSpecs"]
        return next(spec for spec in specs if spec["groupName"] == group)

    def pods(self, group: str) -> set[str]:
        return {
            pod["metadata"]["name"]
            for pod in self.kube.objects(PODS)
            if pod["metadata"]["labels"]["ray.io/group"] == group
        }

    def annotation(self, key: str) -> str:
        return str(
            self.kube.object(RAYSERVICES, "m")["metadata"].get("annotations", {}).get(f"expertmesh.io/{key}")
        )

    def told(self, reason: str) -> list[str]:
        return [event["note"] for event in self.kube.objects(EVENTS) if event["reason"] == reason]

    def operator(
        self, api: KubeApi | None = None, identity: str = "one", times: LeaseTimes = TIMES
    ) -> Operator:
        api = api or self.kube.api()
        leader = Leader(api, "expertmesh-operator", identity, times)
        return Operator(api, leader, lambda cluster: self.mesh.admin, period_s=0.1, gap_s=0.05)


@contextmanager
def running(operator: Operator) -> Iterator[list[BaseException]]:
    """The operator in a thread for a block; what it ended with."""
    ended: list[BaseException] = []

    def run() -> None:
        try:
            operator.run()
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        operator.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def everything(scene: Scene, operator: Operator) -> None:
    """All that an operator does: up, a drained node, down again."""
    scene.until(lambda: operator.looks > 0)
    scene.mesh.client.post("/groups/a/scale", json={"hosts": 3})
    scene.until(lambda: scene.mesh.admin.groups().groups[0].hosts == 3)
    scene.kube.put(NODES, objects.node("node-a2", unschedulable=True))
    scene.until(lambda: "a2" not in scene.pods("a") and scene.mesh.admin.groups().groups[0].hosts == 3)
    scene.mesh.client.post("/groups/a/scale", json={"hosts": 2})
    scene.until(lambda: len(scene.pods("a")) == 2)
    scene.until(lambda: scene.annotation("phase") == "Serving")


class OperatorContract:
    @pytest.fixture
    def scene(self, kube: Kube) -> Iterator[Scene]:
        scene = Scene(kube)
        yield scene
        scene.mesh.running.close()
        assert scene.kuberay.at_random == [], "pods were deleted that nobody named"

    def test_up_drained_and_down_again(self, scene: Scene) -> None:
        operator = scene.operator()
        with running(operator) as ended:
            everything(scene, operator)
        assert not ended
        assert scene.spec("a")["replicas"] == 2 and scene.spec("b")["replicas"] == 1
        assert "a2" not in scene.mesh.where().values() and "a1" in scene.mesh.where().values()
        assert scene.annotation("hosts") == "3/3"
        assert any("node-a2 is cordoned" in note for note in scene.told("Draining"))
        assert any("3 pods instead of 2" in note for note in scene.told("Scaled"))
        assert scene.kube.object(LEASES, "expertmesh-operator")["spec"].get("holderIdentity", "") == ""

    def test_a_node_that_stays_after_all_is_given_back(self, scene: Scene) -> None:
        operator = scene.operator()
        with running(operator):
            # No other pod comes: the group is at its bound, and its last pod can't be let go.
            scene.kube.put(NODES, objects.node("node-b1", unschedulable=True))
            drained = lambda: any(n.drained for n in scene.mesh.admin.groups().nodes if n.hostname == "b1")  # noqa: E731
            deadline = time.monotonic() + DEADLINE_S
            while not drained():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            scene.kube.put(NODES, objects.node("node-b1"))
            while drained():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert "b1" in scene.pods("b")

    def test_once_looks_once(self, scene: Scene) -> None:
        scene.mesh.client.post("/groups/a/scale", json={"hosts": 3})
        scene.operator().run_once()
        assert scene.spec("a")["replicas"] == 3 and scene.annotation("phase") == "Changing"

    def test_a_change_that_was_decided_by_something_older_is_not_made(self, scene: Scene) -> None:
        operator = scene.operator()
        seen = operator._objects
        scene.mesh.client.post("/groups/a/scale", json={"hosts": 3})
        for followed in operator._followed.values():
            followed.refresh()
        groups = objects.group("b", 1, 1, 1), objects.group("a", 4, 1, 4)
        scene.kube.put(RAYCLUSTERS, objects.cluster("c1", *groups))
        assert operator._leader.tick()
        operator.look(seen())
        assert [g["replicas"] for g in scene.kube.object(RAYCLUSTERS, "c1")["spec"]["workerGroupSpecs"]] == [
            1,
            4,
        ]
        operator._leader.release()

    def test_only_one_acts_and_the_other_takes_over(self, scene: Scene) -> None:
        first, second = scene.operator(), scene.operator(identity="two")
        with running(second), running(first):
            scene.until(lambda: first.looks + second.looks > 0)
            leads, waits = (first, second) if first.looks else (second, first)
            looks = leads.looks
            scene.until(lambda: leads.looks > looks + 3)
            assert waits.looks == 0
            leads.stop()
            scene.until(lambda: waits.looks > 0)

    def test_who_loses_the_lease_writes_nothing_any_more(self, scene: Scene) -> None:
        operator = scene.operator()
        assert operator._leader.tick()
        for followed in operator._followed.values():
            followed.refresh()
        lease = scene.kube.object(LEASES, "expertmesh-operator")
        lease["spec"] |= {"holderIdentity": "thief", "leaseDurationSeconds": 60}
        scene.kube.put(LEASES, lease)
        assert not operator._leader.tick()
        scene.mesh.client.post("/groups/a/scale", json={"hosts": 3})
        with pytest.raises(NotLeaderError):
            operator.look(operator._objects())
        assert scene.spec("a")["replicas"] == 2

    def test_it_goes_on_after_the_api_server_was_started_again(self, scene: Scene) -> None:
        operator = scene.operator()
        with running(operator) as ended:
            scene.until(lambda: operator.looks > 0)
            scene.kube.restart()
            scene.mesh.client.post("/groups/a/scale", json={"hosts": 3})
            scene.until(lambda: scene.mesh.admin.groups().groups[0].hosts == 3)
        assert not ended

    def test_with_the_verbs_that_it_uses_all_goes_well(self, kube: Kube, scene: Scene) -> None:
        operator = scene.operator(kube.api(USED))
        with running(operator) as ended:
            everything(scene, operator)
        assert not ended

    @pytest.mark.parametrize("missing", sorted(USED), ids=lambda verb: f"{verb[2]}-{verb[1]}")
    def test_without_one_of_them_it_ends_and_says_which(
        self, kube: Kube, scene: Scene, missing: Verb
    ) -> None:
        operator = scene.operator(kube.api(USED - {missing}))
        scene.mesh.client.post("/groups/a/scale", json={"hosts": 3})
        with running(operator) as ended:
            deadline = time.monotonic() + DEADLINE_S
            while not ended:
                assert time.monotonic() < deadline, f"nobody missed {missing}"
                time.sleep(0.02)
        assert isinstance(ended[0], ForbiddenError)
        assert f"can't {missing[2]} {missing[1]}" in ended[0].message

    def test_a_mesh_that_does_not_answer_is_shown(self, scene: Scene) -> None:
        api = scene.kube.api()
        away = HttpMeshAdmin("http://127.0.0.1:9", "")
        leader = Leader(api, "expertmesh-operator", "one", replace(TIMES, deadline_s=60.0, duration_s=90.0))
        Operator(api, leader, lambda cluster: away).run_once()
        assert scene.annotation("phase") == "Unknown" and "127.0.0.1:9" in scene.annotation("message")
        assert len(scene.told("MeshUnreachable")) == 1
        scene.mesh.running.stop()
        scene.operator().run_once()
        assert scene.annotation("phase") == "Starting"
