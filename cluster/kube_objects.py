"""What the operator reads of RayServices, RayClusters, pods and nodes: plain dicts in, small records out.

Fields and labels are KubeRay 1.7's (ray-operator/apis/ray/v1, controllers/ray/utils/constant.go).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cluster.kube import Object

GROUP_LABEL: Final = "expertmesh.io/group"
"""Of a worker group and its pods: which host group they are for."""
_CLUSTER: Final = "ray.io/cluster"
_RAY_GROUP: Final = "ray.io/group"
_NODE_TYPE: Final = "ray.io/node-type"
# The CRD's default for a group without a limit.
NO_LIMIT: Final = 2147483647


@dataclass(frozen=True, slots=True)
class Taint:
    """One taint of a node."""

    key: str
    effect: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class KubeNode:
    """One node of Kubernetes."""

    name: str
    unschedulable: bool = False
    ready: bool = True
    taints: tuple[Taint, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    allocatable: Mapping[str, str] = field(default_factory=dict)
    """As quantities."""
    conditions: Mapping[str, str] = field(default_factory=dict)
    """Those that are true, with what is said of them, or their reason."""
    going: bool = False
    """It is being deleted."""


@dataclass(frozen=True, slots=True)
class WorkerPod:
    """One pod of a Ray cluster."""

    name: str
    group: str
    """Of the RayCluster; "" for the head."""
    ip: str = ""
    node: str = ""
    phase: str = "Running"
    ready: bool = True
    created: str = ""
    going: bool = False
    """It is being deleted."""
    disrupted: str = ""
    """Why it is about to be: preempted, evicted, its node's taint; "" if it is not."""


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """One worker group of a RayCluster."""

    index: int
    name: str
    host_group: str
    """The mesh's name for it; "" if it is not one of hosts."""
    replicas: int
    least: int
    most: int
    to_delete: tuple[str, ...] = ()
    """Pods that KubeRay was told to delete, gone ones among them."""
    left_alone: str = ""
    """Why nothing is changed of it; "" if it may be."""
    given: frozenset[str] = frozenset()
    """Which of `replicas`, `scaleStrategy`, `workersToDelete` the object has."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The RayCluster that serves."""

    name: str
    head_ip: str
    head_service: str
    autoscaled: bool
    """Ray's own autoscaler changes it."""
    groups: tuple[WorkerGroup, ...]


@dataclass(frozen=True, slots=True)
class Service:
    """One RayService."""

    name: str
    uid: str
    active: str
    """Name of the RayCluster that serves; "" before the first does."""
    pending: str
    """Name of the one that is being brought up."""
    annotations: Mapping[str, str]
    has_hosts: bool
    """Whether some worker group is one of hosts: others are not ours."""


def quantity(text: object) -> float:
    """A quantity of Kubernetes, such as ``500m``, ``64Gi`` or ``1e3``, as a number. ValueError if it is none."""
    # Here, since the mesh's own processes need none of Kubernetes' client.
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(str(text)))


def read_service(raw: Object) -> Service:
    """From a RayService."""
    meta, status = raw["metadata"], raw.get("status") or {}
    config = (raw.get("spec") or {}).get("rayClusterConfig") or {}
    return Service(
        str(meta["name"]),
        str(meta.get("uid", "")),
        str((status.get("activeServiceStatus") or {}).get("rayClusterName") or ""),
        str((status.get("pendingServiceStatus") or {}).get("rayClusterName") or ""),
        dict(meta.get("annotations") or {}),
        any(_host_group(group) for group in config.get("workerGroupSpecs") or ()),
    )


def read_cluster(raw: Object) -> Cluster:
    """From a RayCluster."""
    spec, head = raw["spec"], (raw.get("status") or {}).get("head") or {}
    groups = enumerate(spec.get("workerGroupSpecs") or ())
    return Cluster(
        str(raw["metadata"]["name"]),
        str(head.get("podIP") or ""),
        str(head.get("serviceName") or ""),
        bool(spec.get("enableInTreeAutoscaling")),
        tuple(_group(index, group) for index, group in groups),
    )


def read_pods(raw: Iterable[Object], cluster: str) -> tuple[WorkerPod, ...]:
    """The pods of a RayCluster, sorted by name."""
    pods = [_pod(pod) for pod in raw if _labels(pod).get(_CLUSTER) == cluster]
    return tuple(sorted(pods, key=lambda pod: pod.name))


def read_node(raw: Object) -> KubeNode:
    """From a node."""
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    conditions = {
        str(c["type"]): str(c.get("message") or c.get("reason") or "")
        for c in status.get("conditions") or ()
        if c.get("status") == "True"
    }
    ready = [c for c in status.get("conditions") or () if c["type"] == "Ready"]
    return KubeNode(
        str(meta["name"]),
        bool(spec.get("unschedulable")),
        # A node that says nothing of itself is one that somebody made up, or that has just come.
        not ready or "Ready" in conditions,
        tuple(
            Taint(str(t["key"]), str(t.get("effect", "")), str(t.get("value") or ""))
            for t in spec.get("taints") or ()
        ),
        _labels(raw),
        {str(k): str(v) for k, v in (status.get("allocatable") or {}).items()},
        conditions,
        bool(meta.get("deletionTimestamp")),
    )


def _pod(raw: Object) -> WorkerPod:
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    conditions = {str(c["type"]): c for c in status.get("conditions") or () if c.get("status") == "True"}
    head = _labels(raw).get(_NODE_TYPE) == "head"
    target = conditions.get("DisruptionTarget")
    return WorkerPod(
        str(meta["name"]),
        "" if head else _labels(raw).get(_RAY_GROUP, ""),
        str(status.get("podIP") or ""),
        str(spec.get("nodeName") or ""),
        str(status.get("phase") or "Pending"),
        "Ready" in conditions,
        str(meta.get("creationTimestamp") or ""),
        bool(meta.get("deletionTimestamp")),
        str(target.get("reason") or "DisruptionTarget") if target is not None else "",
    )


def _group(index: int, raw: Mapping[str, Any]) -> WorkerGroup:
    strategy = raw.get("scaleStrategy")
    given = {key for key in ("replicas", "scaleStrategy") if raw.get(key) is not None}
    if strategy and strategy.get("workersToDelete") is not None:
        given.add("workersToDelete")
    several = int(raw.get("numOfHosts") or 1) > 1
    alone = (
        "its replicas have several pods each" if several else "it is suspended" if raw.get("suspend") else ""
    )
    most = raw.get("maxReplicas")
    return WorkerGroup(
        index,
        str(raw["groupName"]),
        _host_group(raw),
        int(raw.get("replicas") or 0),
        int(raw.get("minReplicas") or 0),
        NO_LIMIT if most is None else int(most),
        tuple((strategy or {}).get("workersToDelete") or ()),
        alone,
        frozenset(given),
    )


def _host_group(raw: Mapping[str, Any]) -> str:
    template = ((raw.get("template") or {}).get("metadata") or {}).get("labels") or {}
    return str((raw.get("labels") or {}).get(GROUP_LABEL) or template.get(GROUP_LABEL) or "")


def _labels(raw: Object) -> dict[str, str]:
    return {str(k): str(v) for k, v in (raw["metadata"].get("labels") or {}).items()}
