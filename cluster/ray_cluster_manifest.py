"""The nodes that a RayCluster or a RayService of KubeRay would have: what can be planned before there is a cluster.

Of a pod KubeRay tells Ray the limits of its first container (its requests where there is no limit), what
`rayStartParams` say instead, and the group's labels: kuberay v1.7, ray-operator/controllers/ray/common/pod.go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from cluster.errors import ConfigError
from cluster.kube_objects import quantity
from cluster.messages import NodeInfo

_GPU: Final = "gpu"
"""How names of GPUs end among a container's resources, as KubeRay sees it."""


def read_nodes(file: Path) -> tuple[NodeInfo, ...]:
    """Those of the RayCluster or RayService in a file of manifests, such as `helm template` prints.

    ConfigError if it holds none or several, or can't be read.
    """
    try:
        documents = list(yaml.safe_load_all(file.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}", "name a file of manifests") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML: {error}", "name a file of manifests") from error
    clusters = [spec for document in documents if (spec := _cluster(document)) is not None]
    if len(clusters) != 1:
        raise ConfigError(
            f"{file} holds {len(clusters)} RayClusters and RayServices, one is needed",
            "give what `helm template` prints of one release",
        )
    return nodes_of(clusters[0])


def nodes_of(cluster: Mapping[str, Any]) -> tuple[NodeInfo, ...]:
    """The nodes of a RayCluster's spec: the head, and every group's replicas, called by group and number."""
    head = cluster["headGroupSpec"]
    found = [_node("head", head)]
    for group in cluster.get("workerGroupSpecs") or ():
        replicas = group.get("replicas", group.get("minReplicas", 0))
        for number in range(int(replicas) * int(group.get("numOfHosts", 1))):
            found.append(_node(f"{group['groupName']}-{number}", group))
    return tuple(sorted(found, key=lambda node: node.node_id))


def _cluster(document: object) -> Mapping[str, Any] | None:
    if not isinstance(document, Mapping):
        return None
    spec = document.get("spec") or {}
    kinds = {"RayCluster": spec, "RayService": spec.get("rayClusterConfig")}
    return kinds.get(str(document.get("kind")))


def _node(name: str, group: Mapping[str, Any]) -> NodeInfo:
    resources = group["template"]["spec"]["containers"][0].get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    told = group.get("rayStartParams") or {}
    gpus = [key for key in limits if key.endswith(_GPU)]
    return NodeInfo(
        node_id=name,
        ip="",
        hostname=name,
        cpus=float(told.get("num-cpus", _quantity([limits.get("cpu"), requests.get("cpu")]))),
        gpus=float(told.get("num-gpus", _quantity(limits[key] for key in gpus))),
        memory_bytes=int(told.get("memory", _quantity([limits.get("memory"), requests.get("memory")]))),
        labels={str(key): str(value) for key, value in (group.get("labels") or {}).items()},
    )


def _quantity(wanted: Iterable[object]) -> int:
    """The first that is given, in whole units: Ray counts in them, and KubeRay rounds up."""
    return next((math.ceil(quantity(value)) for value in wanted if value), 0)
