"""A mesh on Ray nodes that the operator scales and empties, by way of a real API server.

Mesh, operator and API server are real. Played are KubeRay, which makes and deletes pods as the RayCluster says, and
kubelets, for which a pod is a Ray node on this machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.admin_client import HttpMeshAdmin
from cluster.groups_report import GroupState
from cluster.kube import EVENTS, NODES, PODS, RAYCLUSTERS, RAYSERVICES
from cluster.ray_cluster_manifest import read_nodes
from tests import kube_objects as objects
from tests.charts.helm import load_objects, one
from tests.e2e.programs import Program, wait_for
from tests.integration.service_mesh import KEY, Mesh, complete, service_mesh
from tests.integration.test_nodes import greedy
from tests.kube_api_server import kube_api_server as kube_api_server
from tests.kube_objects import NAMESPACE, KubeRay
from tests.real_kube import RealKube, with_kuberays_kinds
from workloads.bench.ray_nodes import Worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:Unverified HTTPS"),
]

PROMPT, TOKENS = "The river", 12
CLUSTER = "c1"
STEP_S = 180.0
VALUES: dict[str, Any] = {
    "keys": {"existingSecret": "keys"},
    "operator": {"enabled": True},
    "config": {
        "model": {"name": "tiny"},
        "engine": {"enforce_eager": True, "max_model_len": 512, "kv_cache": "64MiB", "max_num_seqs": 16},
    },
    "router": {"resources": {"limits": {"cpu": "1", "memory": "4Gi"}}},
    "hostGroups": [
        {
            "name": "fast",
            "replicas": 2,
            # Within these bounds by hand alone.
            "autoscale": {
                "min": 1,
                "max": 4,
                "utilisation": 0.95,
                "up_cooldown": "1h",
                "down_cooldown": "1h",
            },
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
        },
        {"name": "slow", "replicas": 1, "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}},
    ],
}


class Cluster:
    """The RayService and its cluster, with a Ray node for each pod."""

    def __init__(self, kube: RealKube, mesh: Mesh) -> None:
        self.kube, self.mesh = kube, mesh
        service = one(load_objects(mesh.manifests.read_text()), "RayService")
        service["metadata"]["namespace"] = NAMESPACE
        self.service = service["metadata"]["name"]
        spec = service["spec"]["rayClusterConfig"]
        kube.put(RAYCLUSTERS, {**objects.cluster(CLUSTER), "spec": spec})
        kube.put(RAYSERVICES, {**service, "status": {"activeServiceStatus": {"rayClusterName": CLUSTER}}})
        self.kuberay = KubeRay(kube, CLUSTER)
        self.workers: dict[str, tuple[str, Worker]] = {}
        """Pod → its group, and its Ray node."""
        for node in read_nodes(mesh.manifests):
            if node.node_id != "head":
                worker = Worker(node.node_id, int(node.cpus), node.labels, node.memory_bytes)
                self._runs(node.node_id, node.node_id.rpartition("-")[0], worker)

    def _runs(self, pod: str, group: str, worker: Worker) -> None:
        self.workers[pod] = group, worker
        self.kube.put(NODES, objects.node(f"node-{pod}"))
        self.kube.put(PODS, objects.pod(pod, CLUSTER, group, self.mesh.nodes.ip(pod), f"node-{pod}"))

    def step(self) -> None:
        """KubeRay and kubelets do their part."""
        self.kuberay.step()
        pods = {pod["metadata"]["name"]: pod for pod in self.kube.objects(PODS)}
        for name in self.workers.keys() - pods.keys():
            del self.workers[name]
            self.mesh.nodes.leave(name)
        for name in pods.keys() - self.workers.keys():
            group = pods[name]["metadata"]["labels"]["ray.io/group"]
            alike = next(worker for of, worker in self.workers.values() if of == group)
            worker = replace(alike, name=name)
            self.mesh.nodes.join(worker)
            self._runs(name, group, worker)

    def until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + STEP_S
        while not done():
            assert time.monotonic() < deadline, (what, self.pods("fast"), self.annotations(), self.told())
            self.step()
            time.sleep(0.2)

    def pods(self, group: str) -> set[str]:
        return {name for name, (of, _) in self.workers.items() if of == group}

    def replicas(self, group: str) -> int:
        specs = self.kube.object(RAYCLUSTERS, CLUSTER)["spec"]["workerGroupSpecs"]
        return next(spec["replicas"] for spec in specs if spec["groupName"] == group)

    def annotations(self) -> dict[str, str]:
        return self.kube.object(RAYSERVICES, self.service)["metadata"].get("annotations") or {}

    def told(self) -> list[str]:
        return [event["note"] for event in self.kube.objects(EVENTS)]


class Asking:
    """A client that asks one thing after the other, and what was wrong with the answers."""

    def __init__(self, url: str, expected: str) -> None:
        self.answers, self.wrong = 0, list[str]()
        self._url, self._expected = url, expected
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(0.1):
            try:
                found = complete(self._url, PROMPT, TOKENS)
            except (AssertionError, httpx.HTTPError) as error:
                self.wrong.append(str(error))
                continue
            self.answers += 1
            if found != self._expected:
                self.wrong.append(found)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with service_mesh(tmp_path_factory.mktemp("mesh"), VALUES) as mesh:
        yield mesh


@contextmanager
def operator(kube: RealKube, mesh: Mesh, folder: Path) -> Iterator[Program]:
    """`expertmesh operator` beside the block; it must let go of its lease."""
    program = Program(
        folder,
        [
            *("operator", "--kubeconfig", str(kube.kubeconfig), "--namespace", NAMESPACE, "--period", "1"),
            *("--admin-url", f"http://127.0.0.1:{mesh.config['admin']['port']}"),
        ],
        {"EXPERTMESH_ADMIN_KEY": f"{KEY}-admin"},
    )
    try:
        yield program
        program.interrupt()
        assert program.wait() == 0, program.err
    finally:
        program.kill()


def test_pods_come_and_go_as_the_mesh_wants_and_nobody_notices(
    mesh: Mesh, kube_api_server: Path, tmp_path: Path
) -> None:
    kube = with_kuberays_kinds(kube_api_server)
    kube.clear()
    told = mesh.deploy(config=str(mesh.write("mesh.yaml")))
    assert told["status"] == "RUNNING", told["message"]
    url = f"http://{mesh.nodes.ip('router-0')}:{mesh.port}"
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 200, 60, "readiness")
    admin = HttpMeshAdmin(f"http://127.0.0.1:{mesh.config['admin']['port']}", f"{KEY}-admin")
    cluster = Cluster(kube, mesh)

    def fast() -> GroupState:
        return next(group for group in admin.groups().groups if group.name == "fast")

    def scaled(hosts: int) -> None:
        asked = httpx.post(
            f"http://127.0.0.1:{mesh.config['admin']['port']}/groups/fast/scale",
            json={"hosts": hosts},
            headers={"Authorization": f"Bearer {KEY}-admin"},
            timeout=60,
        )
        assert asked.is_success, asked.text

    def settled(hosts: int) -> bool:
        state = fast()
        return (state.hosts, state.ready) == (hosts, hosts) and len(cluster.pods("fast")) == hosts

    expected = greedy(mesh.model, PROMPT, TOKENS)
    with operator(kube, mesh, tmp_path / "operator"), Asking(url, expected) as asking:
        cluster.until(
            lambda: cluster.annotations().get("expertmesh.io/phase") == "Serving", "the mesh to be seen"
        )
        assert cluster.annotations()["expertmesh.io/hosts"] == "3/3"

        scaled(3)
        cluster.until(lambda: settled(3), "a third pod with a host")
        assert cluster.replicas("fast") == 3

        kube.put(NODES, objects.node("node-fast-0", unschedulable=True))
        cluster.until(
            lambda: settled(3) and "fast-0" not in cluster.pods("fast"), "the drained node's pod to go"
        )
        assert {node.ip for node in admin.groups().nodes if node.drained} <= {mesh.nodes.ip("fast-0")}

        scaled(2)
        cluster.until(lambda: settled(2), "one pod fewer")
        assert cluster.replicas("fast") == 2
        cluster.until(lambda: cluster.annotations()["expertmesh.io/hosts"] == "3/3", "that to be shown")
        assert complete(url, PROMPT, TOKENS) == expected
    assert asking.wrong == [] and asking.answers > 10
    assert cluster.kuberay.at_random == [], "pods were deleted that nobody named"
    assert any("3 pods instead of 2" in note for note in cluster.told())
    assert any("node-fast-0 is cordoned" in note for note in cluster.told())
