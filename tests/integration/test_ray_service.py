"""The mesh as KubeRay runs it, without KubeRay: nodes with the charts' labels, and Serve given a file to deploy.

The head has no CPUs, engines run on nodes of their own, and hosts one on each node.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.programs import free_port, settings, wait_for
from tests.integration.test_nodes import greedy
from tests.tiny_dense import make_tiny_dense
from workloads.bench.ray_nodes import HEAD, RayNodes, Worker
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow

KEY = "k-of-the-test"


@dataclass(frozen=True)
class Mesh:
    """Nodes, and what Serve is told."""

    nodes: RayNodes
    token: Path
    folder: Path
    serve_config: dict[str, Any]
    model: Path
    port: int
    admin_port: int

    def deploy(self, timeout_s: float = 240, **arguments: Any) -> dict[str, str]:
        (application,) = self.serve_config["applications"]
        changed = {**application, "args": {**application["args"], **arguments}}
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump({**self.serve_config, "applications": [changed]}))
        told = subprocess.run(
            [
                *(sys.executable, "-m", "tests.integration.ray_service_driver"),
                *(self.nodes.address, str(self.token), str(file), str(timeout_s)),
            ],
            env=self.nodes.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s + 60,
        )
        assert told.returncode == 0, told.stderr[-2000:]
        return json.loads(told.stdout.splitlines()[-1])

    def write(self, name: str, **sections: Any) -> Path:
        config = settings(
            self.model,
            self.port,
            engine={"selector": {"expertmesh.io/role": "router"}},
            hosts=[
                {"name": group, "threads": 1, "count": count, "selector": {"expertmesh.io/group": group}}
                for group, count in (("fast", 2), ("slow", 1))
            ],
            server={"host": "0.0.0.0", "api_keys": ["env:EXPERTMESH_API_KEY"]},
            ray={"address": "auto", "controller_selector": {"expertmesh.io/role": "head"}},
            admin={"port": self.admin_port},
            **sections,
        )
        file = self.folder / name
        file.write_text(yaml.safe_dump(config))
        return file


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dense = make_tiny_dense(folder / "dense", num_attention_heads=2, num_key_value_heads=1)
    model = upcycle(dense, folder / "tiny", dtype="float32")
    hosts = [("fast-a", "fast"), ("fast-b", "fast"), ("slow-a", "slow")]
    workers = [
        Worker("router", labels={"expertmesh.io/role": "router"}),
        *(
            Worker(name, labels={"expertmesh.io/role": "host", "expertmesh.io/group": group})
            for name, group in hosts
        ),
    ]
    nodes = RayNodes(token, workers, {"OMP_NUM_THREADS": "1", "EXPERTMESH_API_KEY": KEY})
    serve_config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [
            {
                "name": "expertmesh",
                "route_prefix": "/",
                "import_path": "workloads.ray_service:application",
                "args": {},
            }
        ],
    }
    try:
        nodes.start(head_cpus=0, head_labels={"expertmesh.io/role": "head"})
        yield Mesh(nodes, token, folder, serve_config, model, free_port(), free_port())
    finally:
        nodes.close()


def test_serve_builds_the_mesh_and_the_router_answers(mesh: Mesh) -> None:
    told = mesh.deploy(config=str(mesh.write("mesh.yaml")))
    assert told["status"] == "RUNNING", told["message"]
    # What KubeRay asks before it calls the service ready; requests do not pass there.
    health = httpx.get(f"http://127.0.0.1:{mesh.serve_config['http_options']['port']}/-/healthz", timeout=30)
    assert (health.status_code, health.text) == (200, "success")
    url = f"http://{address(mesh, 'router')}:{mesh.port}"
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 200, 60, "readiness")
    assert complete(url, "The river", 12) == greedy(mesh.model, "The river", 12)
    assert httpx.post(f"{url}/v1/completions", json={}, timeout=30).status_code == 401
    titles = {name: actors(mesh, name) for name in (HEAD, "router", "fast-a", "fast-b", "slow-a")}
    assert "ControllerActor" in titles[HEAD] and "RouterReplica" in titles["router"]
    for name in ("fast-a", "fast-b", "slow-a"):
        assert titles[name] == {"HostActor"}, titles
    admin = httpx.get(f"http://127.0.0.1:{mesh.admin_port}/health", timeout=30)
    assert admin.json() == {"status": "ok"}


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


def address(mesh: Mesh, node: str) -> str:
    return mesh.nodes.ip(node)


def complete(url: str, prompt: str, tokens: int) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def actors(mesh: Mesh, node: str) -> set[str]:
    """Classes of ours with an actor on the node; Serve's and idle workers left out."""
    found = set()
    for _, title in ray_processes(mesh, node):
        name = title.removeprefix("ray::").split(".")[0].split(":")[-1]
        found |= {name} & {"ControllerActor", "HostActor", "RouterReplica"}
        if "RouterReplica" in title or "router" in title.lower():
            found.add("RouterReplica")
    return found


def pids(mesh: Mesh, actor: str) -> set[int]:
    nodes = ("fast-a", "fast-b", "slow-a")
    return {pid for node in nodes for pid, title in ray_processes(mesh, node) if actor in title}


def ray_processes(mesh: Mesh, node: str) -> list[tuple[int, str]]:
    found = []
    for process in mesh.nodes.processes(node):
        try:
            found.append((process.pid, process.cmdline()[0]))
        except (psutil.Error, IndexError):
            continue  # it ended meanwhile
    return found
