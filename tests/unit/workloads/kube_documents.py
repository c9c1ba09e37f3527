"""A cluster as its API tells of it, and an API that answers from such documents."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from cluster.kube_errors import ConflictError, ForbiddenError
from workloads.k8s_api import Document

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@dataclass
class Documents:
    """An API over documents by path; a list's path has its objects under ``items``."""

    found: dict[str, Document] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    refused: set[tuple[str, str]] = field(default_factory=set)
    """(Verb, resource) that a review of permissions says no to."""
    server: str = "https://cluster.test"
    namespace: str = "expertmesh"
    asked: list[tuple[str, str]] = field(default_factory=list)

    def get(self, path: str, **query: str) -> Document | None:
        self.asked.append(("GET", path))
        if path in self.forbidden:
            raise ForbiddenError(f"{path} is forbidden", "ask for that permission")
        return copy.deepcopy(self.found.get(path))

    def create(self, path: str, body: Document, **query: str) -> Document:
        self.asked.append(("POST", path))
        if path in self.forbidden:
            raise ForbiddenError(f"{path} is forbidden", "ask for that permission")
        if path.endswith("selfsubjectaccessreviews"):
            wanted = body["spec"]["resourceAttributes"]
            return {"status": {"allowed": (wanted["verb"], wanted["resource"]) not in self.refused}}
        place = f"{path}/{body['metadata']['name']}"
        if place in self.found:
            raise ConflictError(f"{place} already exists", "look at what is there")
        self.found[place] = body
        return body

    def try_apply(self, path: str, body: Document, manager: str) -> Document | None:
        self.asked.append(("PATCH", path))
        return merged(self.found.get(path, {}), body)


def merged(one: Any, other: Any) -> Any:
    """As a server-side apply does with mappings."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        return {key: merged(one.get(key), other[key]) if key in other else one[key] for key in keys}
    return copy.deepcopy(other)


def crd(plural: str, *fields: str, version: str = "v1") -> Document:
    properties = {name: {"type": "object"} for name in fields}
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": properties}}}}
    return {
        "metadata": {"name": f"{plural}.ray.io"},
        "spec": {"versions": [{"name": version, "served": True, "schema": schema}]},
    }


def operator(
    tag: str = "v1.7.0", *arguments: str, ready: int = 1, namespace: str = "kuberay-system"
) -> Document:
    container = {"image": f"kuberay/operator:{tag}", "args": list(arguments)}
    return {
        "metadata": {"name": "kuberay-operator", "namespace": namespace},
        "spec": {"template": {"spec": {"containers": [container]}}},
        "status": {"readyReplicas": ready},
    }


def node(
    name: str, gpus: int = 0, *, ready: bool = True, taints: bool = False, present: bool = False
) -> Document:
    allocatable = {"cpu": "7500m", "memory": "30Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.present": "true"} if present else {}},
        "spec": {"taints": [{"key": "nvidia.com/gpu"}]} if taints else {},
        "status": {
            "allocatable": allocatable,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def well() -> Documents:
    """A cluster in which nothing is wanting."""
    found: dict[str, Document] = {
        "/version": {"gitVersion": "v1.34.2"},
        "/api/v1/namespaces/expertmesh": {
            "metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
        },
        "/apis/apps/v1/deployments": {"items": [operator()]},
        "/apis/apps/v1/daemonsets": {"items": []},
        "/api/v1/nodes": {"items": [node("a"), node("b", 8, taints=True)]},
        "/apis/storage.k8s.io/v1/storageclasses": {"items": [storage_class("fast", default=True)]},
        "/api/v1/namespaces/expertmesh/secrets/expertmesh-keys": {
            "data": {"EXPERTMESH_API_KEY": "YQ==", "EXPERTMESH_ADMIN_KEY": "Yg=="}
        },
        "/apis/ray.io/v1/namespaces/expertmesh/rayclusters": {
            "items": [{"metadata": {"name": "mesh-x"}, "spec": {"authOptions": {"mode": "token"}}}]
        },
        "/api/v1/namespaces/expertmesh/secrets/mesh-x": {"data": {"auth_token": "dA=="}},
        f"{CRD}/httproutes.gateway.networking.k8s.io": {
            "metadata": {"annotations": {"gateway.networking.k8s.io/bundle-version": "v1.4.0"}}
        },
        f"{CRD}/servicemonitors.monitoring.coreos.com": {"metadata": {}},
    }
    for plural in ("rayclusters", "rayservices", "rayjobs", "raycronjobs"):
        found[f"{CRD}/{plural}.ray.io"] = crd(plural, "tlsOptions")
    return Documents(found)


def storage_class(name: str, *, default: bool = False) -> Document:
    key = "storageclass.kubernetes.io/is-default-class"
    return {"metadata": {"name": name, "annotations": {key: "true"} if default else {}}}
