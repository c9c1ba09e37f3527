"""The mesh as KubeRay runs it: the head has no CPUs, engines run on nodes of their own, and hosts one on each node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.programs import run, wait_for
from tests.integration.service_mesh import Mesh, actors, complete, ray_processes, service_mesh
from tests.integration.test_nodes import greedy
from workloads.bench.ray_nodes import HEAD

pytestmark = pytest.mark.slow

HOSTS = ("fast-0", "fast-1", "slow-0")


VALUES: dict[str, Any] = {
    "keys": {"existingSecret": "keys"},
    "config": {
        "model": {"name": "tiny"},
        "engine": {"enforce_eager": True, "max_model_len": 512, "kv_cache": "64MiB", "max_num_seqs": 16},
    },
    "router": {"resources": {"limits": {"cpu": "1", "memory": "4Gi"}}},
    "hostGroups": [
        {"name": "fast", "replicas": 2, "resources": {"limits": {"cpu": "2", "memory": "1Gi"}}},
        {"name": "slow", "replicas": 1, "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}},
    ],
}
"""A router's pod, and three of unequal hosts."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with service_mesh(tmp_path_factory.mktemp("mesh"), VALUES) as mesh:
        yield mesh


def test_the_mesh_is_as_planned_and_its_router_answers(mesh: Mesh, tmp_path: Path) -> None:
    config = mesh.write("mesh.yaml")
    told = mesh.deploy(config=str(config))
    assert told["status"] == "RUNNING", told["message"]
    # What KubeRay asks before it calls the service ready; requests do not pass there.
    health = httpx.get(f"http://127.0.0.1:{mesh.serve_config['http_options']['port']}/-/healthz", timeout=30)
    assert (health.status_code, health.text) == (200, "success")
    url = f"http://{mesh.nodes.ip('router-0')}:{mesh.port}"
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 200, 60, "readiness")
    assert complete(url, "The river", 12) == greedy(mesh.model, "The river", 12)
    assert httpx.post(f"{url}/v1/completions", json={}, timeout=30).status_code == 401
    assert "ControllerActor" in actors(mesh, HEAD) and "RouterReplica" in actors(mesh, "router-0")
    for name in HOSTS:
        assert actors(mesh, name) == {"HostActor"}, name
    health = httpx.get(f"http://127.0.0.1:{mesh.config['admin']['port']}/health", timeout=30)
    assert health.json() == {"status": "ok"}

    # What is planned of the manifests alone is what came about.
    planned = run(
        tmp_path / "plan",
        *("plan", "--config", str(config), "--ray-cluster", str(mesh.manifests), "--json"),
        environment=mesh.nodes.environment,
    )
    assert planned.process.returncode == 0, planned.err
    hosts = json.loads(planned.out)["hosts"]
    assert sorted(host["node"] for host in hosts.values()) == sorted(HOSTS)
    assert len({host["node"] for host in told["hosts"].values()}) == len(HOSTS)
    assert {
        host_id: (host["node"].rpartition("-")[0], host["threads"], host["experts"])
        for host_id, host in hosts.items()
    } == {
        host_id: (host["group"], host["threads"], host["experts"]) for host_id, host in told["hosts"].items()
    }


@pytest.mark.long
def test_the_same_again_keeps_hosts_and_another_is_refused(mesh: Mesh) -> None:
    before = pids(mesh, "HostActor")
    assert len(before) == 3
    # What Serve is told differs, the mesh does not.
    assert mesh.deploy(config=str(mesh.write("mesh.yaml")), nodes_timeout_s=1)["status"] == "RUNNING"
    assert pids(mesh, "HostActor") == before
    told = mesh.deploy(config=str(mesh.write("other.yaml", placement={"replicas": 2})))
    assert told["status"] == "DEPLOY_FAILED"
    assert "tiny is deployed on this cluster with another placement" in told["message"]
    assert "upgrade through a new cluster" in told["message"]
    assert pids(mesh, "HostActor") == before


def pids(mesh: Mesh, actor: str) -> set[int]:
    return {pid for node in HOSTS for pid, title in ray_processes(mesh, node) if actor in title}
