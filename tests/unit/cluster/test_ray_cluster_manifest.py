"""Nodes from manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import ConfigError
from cluster.messages import NodeInfo
from cluster.ray_cluster_manifest import nodes_of, read_nodes

GIB = 2**30


def group(**changes: Any) -> dict[str, Any]:
    resources = changes.pop("resources", {"limits": {"cpu": "3500m", "memory": "8Gi"}})
    template = {"spec": {"containers": [{"name": "ray", "resources": resources}]}}
    return {"template": template, "rayStartParams": {}, **changes}


HEAD = group(rayStartParams={"num-cpus": "0"}, labels={"expertmesh.io/role": "head"})


def test_what_kuberay_tells_ray_of_pods() -> None:
    gpu = {"limits": {"cpu": 8, "memory": "1e9", "nvidia.com/gpu": 2}}
    nodes = nodes_of(
        {
            "headGroupSpec": HEAD,
            "workerGroupSpecs": [
                group(groupName="big", replicas=2, labels={"expertmesh.io/group": "big"}),
                group(groupName="gpu", minReplicas=1, resources=gpu),
                group(groupName="asks", replicas=1, resources={"requests": {"cpu": "2", "memory": "1Gi"}}),
                group(groupName="none", replicas=0),
            ],
        }
    )
    big = {"expertmesh.io/group": "big"}
    assert nodes == (
        NodeInfo("asks-0", "", "asks-0", 2, 0, GIB),
        NodeInfo("big-0", "", "big-0", 4, 0, 8 * GIB, big),
        NodeInfo("big-1", "", "big-1", 4, 0, 8 * GIB, big),
        NodeInfo("gpu-0", "", "gpu-0", 8, 2, 10**9),
        NodeInfo("head", "", "head", 0, 0, 8 * GIB, {"expertmesh.io/role": "head"}),
    )


def test_of_several_manifests_the_one_with_nodes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    service = {"kind": "RayService", "spec": {"rayClusterConfig": {"headGroupSpec": HEAD}}}
    documents: list[Any] = [{"kind": "ConfigMap"}, None, service]
    file.write_text(yaml.safe_dump_all(documents))
    assert [node.node_id for node in read_nodes(file)] == ["head"]
    file.write_text(yaml.safe_dump_all([*documents, {"kind": "RayCluster", "spec": {"headGroupSpec": HEAD}}]))
    with pytest.raises(ConfigError, match="2 RayClusters and RayServices"):
        read_nodes(file)
    file.write_text("kind: ConfigMap")
    with pytest.raises(ConfigError, match="0 RayClusters"):
        read_nodes(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="is no YAML"):
        read_nodes(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_nodes(tmp_path / "none.yaml")
