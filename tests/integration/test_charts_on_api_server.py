"""expertmesh-serve on a real API server: both helms bring it up, change it, take the change back, take it down; and
its scheduler puts the rendered pods onto a made-up fleet as intended.

That server is of Kubernetes 1.20, without policy/v1: PodDisruptionBudgets are left out, and the chart's own bound on
Kubernetes' version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.charts.helm import CHARTS, Helm, Object, one
from tests.e2e.programs import wait_for
from tests.kube_api_server import CRDS
from tests.kube_api_server import kube_api_server as kube_api_server

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Unverified HTTPS request")]

CHART: Final = "expertmesh-serve"
GROUP, VERSION = "ray.io", "v1"
GPU: Final = "nvidia.com/gpu"
NO_BUDGETS: Final = {
    "head": {"minAvailable": 0},
    "router": {"minAvailable": 0},
    "hostDefaults": {"minAvailable": 0},
}


class Cluster:
    """The server as its admin."""

    def __init__(self, kubeconfig: Path) -> None:
        from kubernetes import client, config

        self.kubeconfig = kubeconfig
        self.client = config.new_client_from_config(str(kubeconfig))
        self.core = client.CoreV1Api(self.client)
        self.custom = client.CustomObjectsApi(self.client)
        self.extensions = client.ApiextensionsV1Api(self.client)
        self.network = client.NetworkingV1Api(self.client)

    def namespace(self, name: str) -> str:
        self.core.create_namespace({"metadata": {"name": name}})
        return name

    def service(self, namespace: str, name: str) -> Object:
        return self.custom.get_namespaced_custom_object(GROUP, VERSION, namespace, "rayservices", name)

    def owned(self, namespace: str) -> set[str]:
        """What there is in the namespace beside what every one has."""
        read = {
            "Service": self.core.list_namespaced_service,
            "ConfigMap": self.core.list_namespaced_config_map,
            "ServiceAccount": self.core.list_namespaced_service_account,
            "PersistentVolumeClaim": self.core.list_namespaced_persistent_volume_claim,
            "NetworkPolicy": self.network.list_namespaced_network_policy,
        }
        found = {
            f"{kind}/{item.metadata.name}" for kind, ask in read.items() for item in ask(namespace).items
        }
        services = self.custom.list_namespaced_custom_object(GROUP, VERSION, namespace, "rayservices")
        found |= {f"RayService/{item['metadata']['name']}" for item in services["items"]}
        return {name for name in found if name.split("/")[1] not in ("default", "kube-root-ca.crt")}


@pytest.fixture(scope="module")
def cluster(kube_api_server: Path) -> Cluster:
    from kubernetes.client.exceptions import ApiException

    found = Cluster(kube_api_server)
    for file in sorted(CRDS.glob("*.json")):
        try:
            found.extensions.create_custom_resource_definition(json.loads(file.read_text()))
        except ApiException as error:
            if error.status != 409:
                raise

    def served() -> bool:
        known = found.extensions.list_custom_resource_definition().items
        return bool(known) and all(
            any(c.type == "Established" and c.status == "True" for c in crd.status.conditions or ())
            for crd in known
        )

    wait_for(served, 30, "KubeRay's kinds to be served")
    return found


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart as it is, but for the Kubernetes that it asks for."""
    folder = tmp_path_factory.mktemp("chart") / CHART
    shutil.copytree(CHARTS / CHART, folder)
    file = folder / "Chart.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("kubeVersion:")]
    file.write_text("\n".join(lines) + "\n")
    return folder


def values(folder: Path, name: str, **changes: Any) -> Path:
    made = {
        **NO_BUDGETS,
        "keys": {"existingSecret": "keys"},
        "storage": {"model": {"existingClaim": "models"}},
        "hostGroups": [{"name": "cpu", "replicas": 3}],
        **changes,
    }
    file = folder / name
    file.write_text(json.dumps(made))
    return file


@pytest.mark.parametrize("major", [3, 4])
def test_helm_installs_upgrades_rolls_back_and_uninstalls(
    cluster: Cluster, chart: Path, tmp_path: Path, major: int
) -> None:
    helm, namespace = Helm(major), cluster.namespace(f"helm-{major}")

    def run(*arguments: str) -> str:
        return helm.run(*arguments, "--namespace", namespace, kubeconfig=cluster.kubeconfig)

    def replicas() -> list[int]:
        groups = cluster.service(namespace, "mesh-expertmesh-serve")["spec"]["rayClusterConfig"][
            "workerGroupSpecs"
        ]
        return [group["replicas"] for group in groups if group["groupName"] == "cpu"]

    first = values(tmp_path, "first.json")
    run("install", "mesh", str(chart), "--values", str(first))
    there = cluster.owned(namespace)
    assert {
        f"{kind}/mesh-expertmesh-serve" for kind in ("RayService", "ConfigMap", "ServiceAccount")
    } <= there
    assert {"Service/mesh-expertmesh-serve-api", "Service/mesh-expertmesh-serve-admin"} <= there
    assert replicas() == [3]

    second = values(tmp_path, "second.json", hostGroups=[{"name": "cpu", "replicas": 4}, {"name": "more"}])
    run("upgrade", "mesh", str(chart), "--values", str(second))
    groups = cluster.service(namespace, "mesh-expertmesh-serve")["spec"]["rayClusterConfig"][
        "workerGroupSpecs"
    ]
    assert [group["groupName"] for group in groups] == ["router", "cpu", "more"] and replicas() == [4]
    # What a wrong value does to what runs: nothing.
    with pytest.raises(Exception, match="replcas"):
        run(
            "upgrade",
            "mesh",
            str(chart),
            "--values",
            str(values(tmp_path, "bad.json", router={"replcas": 2})),
        )
    assert replicas() == [4]

    run("rollback", "mesh", "1")
    assert replicas() == [3] and cluster.owned(namespace) == there
    run("uninstall", "mesh")
    # What versions were published outlives the release, if it says so.
    kept = {name for name in cluster.owned(namespace) if name.startswith("PersistentVolumeClaim/")}
    assert cluster.owned(namespace) == kept <= there


NODES: Final = {
    **{f"gpu-{i}": {"cpu": "16", "memory": "128Gi", GPU: "1"} for i in range(3)},
    **{f"cpu-{i}": {"cpu": "16", "memory": "160Gi"} for i in range(4)},
}


@pytest.fixture(scope="module")
def fleet(cluster: Cluster) -> Iterator[None]:
    """Nodes that nobody runs: objects, as the scheduler sees them."""
    for name, room in NODES.items():
        gpu = GPU in room
        labels = {
            "kubernetes.io/hostname": name,
            "fleet": "made-up",
            **({"accelerator": "h100"} if gpu else {}),
        }
        taints = [{"key": GPU, "value": "present", "effect": "NoSchedule"}] if gpu else []
        cluster.core.create_node({"metadata": {"name": name, "labels": labels}, "spec": {"taints": taints}})
        status = {
            "capacity": {**room, "pods": "20"},
            "allocatable": {**room, "pods": "20"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "made", "message": "up"}],
        }
        cluster.core.patch_node_status(name, {"status": status})
        # The server takes new nodes for not ready until their kubelet says otherwise.
        cluster.core.patch_node(name, {"spec": {"taints": taints or None}})
    yield
    for name in NODES:
        cluster.core.delete_node(name)


def pods(objects: list[Object]) -> list[tuple[str, Object]]:
    """Group and pod, of each that KubeRay would make of the rendered RayService."""
    spec = one(objects, "RayService")["spec"]["rayClusterConfig"]
    groups = [("head", 1, spec["headGroupSpec"])]
    groups += [(group["groupName"], group["replicas"], group) for group in spec["workerGroupSpecs"]]
    return [(name, group["template"]) for name, count, group in groups for _ in range(count)]


def test_the_scheduler_puts_pods_where_they_are_meant(cluster: Cluster, fleet: None) -> None:
    namespace = cluster.namespace("scheduled")
    mixed = CHARTS / CHART / "ci" / "mixed-values.yaml"
    rendered = Helm(4).template(CHART, [mixed], {"router": {"replicas": 1}}, namespace=namespace)
    made: dict[str, str] = {}
    for number, (group, template) in enumerate(pods(rendered)):
        name = f"{group}-{number}"
        made[name] = group
        spec = template["spec"]
        # Claims would have to be bound first, by controllers that do not run here.
        for volume in spec["volumes"]:
            if volume.pop("persistentVolumeClaim", None) is not None:
                volume["emptyDir"] = {}
        metadata = {**template["metadata"], "name": name}
        cluster.core.create_namespaced_pod(namespace, {"metadata": metadata, "spec": spec})

    def placed() -> dict[str, str] | None:
        found = {p.metadata.name: p.spec.node_name for p in cluster.core.list_namespaced_pod(namespace).items}
        return found if all(found.values()) else None

    where = wait_for(placed, 60, "every pod to have a node")
    by_group: dict[str, list[str]] = {}
    for name, node in where.items():
        by_group.setdefault(made[name], []).append(node)
    assert {group: len(nodes) for group, nodes in by_group.items()} == {
        "head": 1,
        "router": 1,
        "gpu": 2,
        "cpu": 3,
    }
    # Whoever needs a GPU has one of its own, and nobody else is on such a node.
    with_gpu = by_group["router"] + by_group["gpu"]
    assert sorted(with_gpu) == ["gpu-0", "gpu-1", "gpu-2"]
    assert all(node.startswith("cpu-") for node in by_group["head"] + by_group["cpu"])
    # Hosts of a group are spread over nodes.
    assert len(set(by_group["cpu"])) == 3

    # One GPU host more than there are GPUs waits, and takes no other's place.
    group, template = next((group, template) for group, template in pods(rendered) if group == "gpu")
    spec = template["spec"]
    for volume in spec["volumes"]:
        if volume.pop("persistentVolumeClaim", None) is not None:
            volume["emptyDir"] = {}
    metadata = {**template["metadata"], "name": "one-more"}
    cluster.core.create_namespaced_pod(namespace, {"metadata": metadata, "spec": spec})

    def refused() -> str | None:
        pod = cluster.core.read_namespaced_pod("one-more", namespace)
        assert pod.spec.node_name is None
        return next((c.message for c in pod.status.conditions or () if c.reason == "Unschedulable"), None)

    told = wait_for(refused, 60, "the scheduler to say why")
    assert GPU in told and "0/7 nodes are available" in told
    assert placed() is None and len([p for p in where if made[p] == "gpu"]) == 2
