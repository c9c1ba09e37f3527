"""`expertmesh k8s doctor`: what a cluster has and lacks of what the charts need, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.table import Table

from cluster.kube_errors import ForbiddenError
from workloads import k8s_checks as checks
from workloads.k8s_api import Api, Document
from workloads.k8s_checks import Finding

_CRD: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_DEPLOYMENTS: Final = "/apis/apps/v1/deployments"
_REVIEW: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_VERBS: Final = ("get", "create", "patch", "delete")

# Kinds of each chart's objects, as (group, resource); Secrets are where helm keeps its releases.
_ALL: Final = (
    ("", "secrets"),
    ("", "configmaps"),
    ("", "serviceaccounts"),
    ("networking.k8s.io", "networkpolicies"),
)
INSTALLS: Final = {
    "serve": (
        *_ALL,
        ("", "services"),
        ("", "persistentvolumeclaims"),
        ("policy", "poddisruptionbudgets"),
        ("ray.io", "rayservices"),
    ),
    "learn": (
        *_ALL,
        ("", "persistentvolumeclaims"),
        ("batch", "cronjobs"),
        ("rbac.authorization.k8s.io", "roles"),
        ("rbac.authorization.k8s.io", "rolebindings"),
        # Nobody may grant what they may not do themselves.
        ("ray.io", "rayjobs"),
    ),
    "operator": (
        *_ALL,
        ("apps", "deployments"),
        ("policy", "poddisruptionbudgets"),
        ("rbac.authorization.k8s.io", "roles"),
        ("rbac.authorization.k8s.io", "rolebindings"),
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """Of which installation is asked."""

    namespace: str
    secret: str = "expertmesh-keys"
    keys: tuple[str, ...] = ("EXPERTMESH_API_KEY", "EXPERTMESH_ADMIN_KEY")


def findings(api: Api, asked: Asked) -> Iterator[Finding]:
    """Every check, cheap ones first. KubeError if the cluster does not answer at all."""
    yield checks.check_version(api.get("/version") or {})
    namespace = asked.namespace
    yield from _look(
        "namespace",
        lambda: [checks.check_namespace(namespace, api.get(f"/api/v1/namespaces/{namespace}"))],
    )
    yield from _look(
        "crds", lambda: checks.check_crds({name: _crd(api, f"{name}.ray.io") for name in checks.CRDS})
    )
    yield from _look("kuberay", lambda: checks.check_operator(_operators(api), namespace))
    yield from _look("nodes", lambda: checks.check_nodes(items(api, "/api/v1/nodes"), _plugins(api)))
    yield from _look(
        "storage", lambda: [checks.check_storage(items(api, "/apis/storage.k8s.io/v1/storageclasses"))]
    )
    for chart, resources in INSTALLS.items():
        yield checks.check_permissions(chart, _refused(api, namespace, resources))
    yield from _look(
        f"secret {asked.secret}",
        lambda: [checks.check_keys(asked.secret, _secret(api, namespace, asked.secret), asked.keys)],
    )
    yield from _look("tokens", lambda: _tokens(api, namespace))
    yield from _look(
        "gateway api",
        lambda: [
            checks.check_crd_of_option(
                "gateway api",
                _crd(api, "httproutes.gateway.networking.k8s.io"),
                "only for gateway.enabled: an Ingress or `kubectl port-forward` does as well",
            )
        ],
    )
    yield from _look(
        "monitors",
        lambda: [
            checks.check_crd_of_option(
                "monitors",
                _crd(api, "servicemonitors.monitoring.coreos.com"),
                "only for monitoring by the Prometheus operator; /metrics is there without it",
            )
        ],
    )


def _look(name: str, found: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings, or one that says that these credentials may not look."""
    try:
        yield from list(found())
    except ForbiddenError as error:
        yield Finding(name, "warn", f"can't be looked at: {error.message}", error.hint)


def _crd(api: Api, name: str) -> Document | None:
    return api.get(f"{_CRD}/{name}")


def items(api: Api, path: str, **query: str) -> list[Document]:
    return list((api.get(path, **query) or {}).get("items") or ())


def _operators(api: Api) -> list[Document]:
    return items(api, _DEPLOYMENTS, labelSelector="app.kubernetes.io/name=kuberay-operator")


def _plugins(api: Api) -> int:
    """DaemonSets of NVIDIA's device plugin that run on some node."""
    return sum(
        1
        for one in items(api, "/apis/apps/v1/daemonsets")
        if "nvidia-device-plugin" in one["metadata"]["name"]
        and (one.get("status") or {}).get("numberAvailable")
    )


def _refused(api: Api, namespace: str, resources: Iterable[tuple[str, str]]) -> list[str]:
    refused = []
    for group, resource in resources:
        verbs = [verb for verb in _VERBS if not _may(api, namespace, verb, group, resource)]
        if verbs:
            refused.append(f"{'/'.join(verbs)} {resource}")
    return refused


def _may(api: Api, namespace: str, verb: str, group: str, resource: str) -> bool:
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
    answer = api.create(
        _REVIEW,
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        },
    )
    return bool((answer.get("status") or {}).get("allowed"))


def _secret(api: Api, namespace: str, name: str) -> Document | None:
    return api.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")


def _tokens(api: Api, namespace: str) -> Iterator[Finding]:
    """Of the Ray clusters that are there: that each asks for a token, and has it."""
    for cluster in items(api, f"/apis/ray.io/v1/namespaces/{namespace}/rayclusters"):
        name, options = cluster["metadata"]["name"], cluster["spec"].get("authOptions") or {}
        if options.get("mode") != "token":
            yield Finding(
                f"token of {name}",
                "fail",
                "whoever reaches this Ray cluster can run code in it",
                "set authOptions.mode: token, as the charts do",
            )
            continue
        secret = str(options.get("secretName") or name)
        found = checks.check_keys(
            secret, _secret(api, namespace, secret), ("auth_token",), "KubeRay makes it"
        )
        yield Finding(f"token of {name}", found.status, found.found, found.hint)


def as_table(found: Iterable[Finding]) -> Table:
    """For a person."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "what", "found", "way out", box=None, pad_edge=False)
    for one in found:
        mark = f"[{colours[one.status]}]{one.status}[/]"
        table.add_row(mark, one.name, one.found, one.hint if one.status != "ok" else "")
    return table


def as_json(server: str, asked: Asked, found: Iterable[Finding]) -> dict[str, Any]:
    """For a program."""
    listed = list(found)
    return {
        "server": server,
        "namespace": asked.namespace,
        "well": all(one.status != "fail" for one in listed),
        "findings": [asdict(one) for one in listed],
    }
