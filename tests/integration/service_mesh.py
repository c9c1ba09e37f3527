"""A mesh as KubeRay runs it, without KubeRay: a node for each pod of a rendered chart, with its labels and resources,
and Serve given the chart's file to deploy.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from cluster.ray_cluster_manifest import read_nodes
from tests.charts.helm import Helm, load_objects, of_kind, one
from tests.e2e.programs import free_port
from tests.tiny_dense import make_tiny_dense
from workloads.bench.ray_nodes import RayNodes, Worker
from workloads.models.upcycle import upcycle

KEY = "k-of-the-test"


@dataclass(frozen=True)
class Mesh:
    """Nodes, and what Serve is told."""

    nodes: RayNodes
    token: Path
    folder: Path
    manifests: Path
    serve_config: dict[str, Any]
    config: dict[str, Any]
    """What the chart makes of the values, with ports and folders of this machine's."""
    model: Path

    @property
    def port(self) -> int:
        return self.config["server"]["port"]

    def deploy(self, timeout_s: float = 240, **arguments: Any) -> dict[str, Any]:
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
        file = self.folder / name
        file.write_text(yaml.safe_dump({**self.config, **sections}))
        return file


@contextmanager
def service_mesh(folder: Path, values: Mapping[str, Any]) -> Iterator[Mesh]:
    """Nodes for all pods of the chart with these values; nothing is deployed yet."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dense = make_tiny_dense(
        folder / "dense", num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024
    )
    model = upcycle(dense, folder / "tiny", dtype="float32")

    manifests = folder / "manifests.yaml"
    manifests.write_text(Helm(4).rendered("expertmesh-serve", values=dict(values)))
    objects = load_objects(manifests.read_text())
    serve_config = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    serve_config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    files = [item["data"] for item in of_kind(objects, "ConfigMap")]
    (file,) = (data["expertmesh.yaml"] for data in files if "expertmesh.yaml" in data)
    config = yaml.safe_load(file)
    config["model"]["path"] = str(model)
    config["server"]["port"], config["admin"]["port"] = free_port(), free_port()
    config["versions"]["store"] = str(folder / "versions")

    pods = {node.node_id: node for node in read_nodes(manifests)}
    head = pods.pop("head")
    workers = [
        Worker(name, cpus=int(pod.cpus), labels=pod.labels, memory_bytes=pod.memory_bytes)
        for name, pod in pods.items()
    ]
    keys = {"EXPERTMESH_API_KEY": KEY, "EXPERTMESH_ADMIN_KEY": f"{KEY}-admin"}
    nodes = RayNodes(token, workers, {"OMP_NUM_THREADS": "1", **keys})
    try:
        nodes.start(head_cpus=int(head.cpus), head_labels=head.labels)
        yield Mesh(nodes, token, folder, manifests, serve_config, config, model)
    finally:
        nodes.close()


def complete(url: str, prompt: str, tokens: int) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def actors(mesh: Mesh, node: str) -> set[str]:
    """What of ours runs on the node, by how Ray titles processes: a named actor by its name first, in mid-call."""
    titles = {name: name for name in ("ControllerActor", "HostActor")}
    titles["RouterReplica"] = "ServeReplica:expertmesh:router"
    running = [title for _, title in ray_processes(mesh, node)]
    return {name for name, title in titles.items() if any(title in one for one in running)}


def ray_processes(mesh: Mesh, node: str) -> list[tuple[int, str]]:
    found = []
    for process in mesh.nodes.processes(node):
        try:
            found.append((process.pid, process.cmdline()[0]))
        except (psutil.Error, IndexError):
            continue  # it ended meanwhile
    return found
