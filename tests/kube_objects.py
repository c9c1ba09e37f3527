"""A mesh on KubeRay as its objects are, and KubeRay's part on pods, for tests of the operator."""

from __future__ import annotations

from itertools import count
from typing import Any

from cluster.kube import NODES, PODS, RAYCLUSTERS, RAYSERVICES, Resource

NAMESPACE = "mesh"


def group(name: str, replicas: int, least: int, most: int, **more: Any) -> dict[str, Any]:
    """A worker group of hosts."""
    return {
        "groupName": name,
        "replicas": replicas,
        "minReplicas": least,
        "maxReplicas": most,
        "labels": {"expertmesh.io/group": name},
        "rayStartParams": {},
        "template": {"spec": {"containers": [{"name": "ray-worker", "image": "expertmesh:0.1.0"}]}},
        **more,
    }


def cluster(name: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A RayCluster."""
    head = {"spec": {"containers": [{"name": "ray-head", "image": "expertmesh:0.1.0"}]}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"headGroupSpec": {"template": head}, "workerGroupSpecs": list(groups), **more},
    }


def service(name: str, active: str, *groups: dict[str, Any]) -> dict[str, Any]:
    """A RayService whose cluster `active` serves."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"rayClusterConfig": cluster(active, *groups)["spec"]},
        "status": {"activeServiceStatus": {"rayClusterName": active}},
    }


def pod(name: str, cluster_name: str, group_name: str, ip: str = "", node: str = "") -> dict[str, Any]:
    """A worker pod that runs, or one that waits for a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {
                "ray.io/cluster": cluster_name,
                "ray.io/group": group_name,
                "ray.io/node-type": "worker",
            },
        },
        "spec": {
            "containers": [{"name": "ray-worker", "image": "expertmesh:0.1.0"}],
            **({"nodeName": node} if node else {}),
        },
        "status": {"phase": "Running" if ip else "Pending", **({"podIP": ip} if ip else {})},
    }


def node(name: str, *taints: dict[str, str], unschedulable: bool = False) -> dict[str, Any]:
    """A node of Kubernetes."""
    spec: dict[str, Any] = {"taints": list(taints)} if taints else {}
    if unschedulable:
        spec["unschedulable"] = True
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec}


class KubeRay:
    """What KubeRay does about a cluster's pods: those that are to be deleted go, missing ones come.

    Where there are too many it deletes any, as the real one does; that is what the operator must never let happen.
    """

    def __init__(self, objects: Any, cluster_name: str) -> None:
        """`objects` puts, removes and lists objects, as `tests.fake_kube.FakeKube` does."""
        self._objects, self._cluster, self._numbers = objects, cluster_name, count(1)
        self.at_random: list[str] = []
        """Pods that were deleted though nobody named them."""

    def step(self) -> None:
        for spec in self._objects.object(RAYCLUSTERS, self._cluster)["spec"]["workerGroupSpecs"]:
            mine = [
                p for p in self._objects.objects(PODS)
                if p["metadata"]["labels"].get("ray.io/group") == spec["groupName"]
            ]  # fmt: skip
            named = (spec.get("scaleStrategy") or {}).get("workersToDelete") or []
            for gone in [p for p in mine if p["metadata"]["name"] in named]:
                self._objects.remove(PODS, gone["metadata"]["name"])
                mine.remove(gone)
            wanted = min(max(spec["replicas"], spec["minReplicas"]), spec["maxReplicas"])
            for extra in mine[: max(0, len(mine) - wanted)]:
                self.at_random.append(extra["metadata"]["name"])
                self._objects.remove(PODS, extra["metadata"]["name"])
            for _ in range(wanted - len(mine)):
                name = f"{self._cluster}-{spec['groupName']}-{next(self._numbers)}"
                self._objects.put(PODS, pod(name, self._cluster, spec["groupName"]))


KINDS: tuple[Resource, ...] = (RAYSERVICES, RAYCLUSTERS, PODS, NODES)
