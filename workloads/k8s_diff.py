"""What applying a rendering would change in a cluster, found out by a server-side apply that is only tried.

Defaults, conversions and admission are the server's, so that what is shown is what would be there.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import yaml

from cluster.kube_errors import KubeError
from workloads.k8s_api import Api, Document
from workloads.k8s_kinds import Kinds
from workloads.k8s_render import is_test

MANAGER: Final = "helm"
_SERVERS_OWN: Final = (
    "managedFields",
    "resourceVersion",
    "uid",
    "creationTimestamp",
    "generation",
    "selfLink",
)
_NOISE: Final = (
    "kubectl.kubernetes.io/last-applied-configuration",
    "deployment.kubernetes.io/revision",
    # Said by helm itself when it installs; a rendering has neither.
    "meta.helm.sh/release-name",
    "meta.helm.sh/release-namespace",
)


@dataclass(frozen=True, slots=True)
class Change:
    """One object that would not be as it is."""

    kind: str
    name: str
    action: Literal["create", "change", "remove"]
    text: str
    """A unified diff."""


def changes(api: Api, rendered: Iterable[Document], namespace: str, release: str = "") -> Iterator[Change]:
    """Every object that applying would make or change, in the rendering's order, then those that are left over.

    ``release``: objects with this ``app.kubernetes.io/instance`` that the rendering lacks would be removed; only
    kinds of which it has an object are looked through. KubeError if the cluster lacks the namespace or a kind, or
    refuses an object.
    """
    if api.get(f"/api/v1/namespaces/{namespace}") is None:
        raise KubeError(
            f"{api.server} has no namespace {namespace}",
            f"kubectl create namespace {namespace}, or kubectl apply -k k8s/overlays/dev",
        )
    kinds = Kinds(api)
    wanted = [document for document in rendered if not is_test(document)]
    names: dict[str, set[str]] = {}
    for document in wanted:
        kind, name = kinds.of(document), document["metadata"]["name"]
        place = document["metadata"].get("namespace", namespace)
        path = kind.path(place, name)
        names.setdefault(kind.path(namespace), set()).add(name)
        live = api.get(path)
        planned = api.try_apply(path, document, MANAGER)
        if planned is None:
            raise KubeError(f"{api.server} has no {path}", "see whether its namespace exists")
        text = difference(path, live, planned)
        if text:
            yield Change(document["kind"], name, "change" if live is not None else "create", text)
    yield from _left_over(api, names, release)


def _left_over(api: Api, names: dict[str, set[str]], release: str) -> Iterator[Change]:
    if not release:
        return
    for path, known in names.items():
        selector = f"app.kubernetes.io/instance={release},app.kubernetes.io/managed-by=Helm"
        found = api.get(path, labelSelector=selector) or {}
        for live in found.get("items") or ():
            metadata = live["metadata"]
            # What a controller made carries the labels of what it was made of.
            if metadata["name"] in known or metadata.get("ownerReferences"):
                continue
            kind = str(live.get("kind") or found.get("kind", "").removesuffix("List"))
            yield Change(
                kind, metadata["name"], "remove", difference(f"{path}/{metadata['name']}", live, None)
            )


def difference(path: str, live: Document | None, planned: Document | None) -> str:
    """A unified diff of two states of one object, "" where they are the same to whoever wrote it."""
    live, planned = without_secrets(live, planned)
    before, after = (as_lines(one) if one is not None else [] for one in (live, planned))
    return "".join(
        difflib.unified_diff(
            before,
            after,
            f"live{path}" if live is not None else "/dev/null",
            f"planned{path}" if planned is not None else "/dev/null",
        )
    )


def without_secrets(
    live: Document | None, planned: Document | None
) -> tuple[Document | None, Document | None]:
    """Both, with a Secret's values told apart and not shown: a diff ends up in logs."""
    if "Secret" not in {(one or {}).get("kind") for one in (live, planned)}:
        return live, planned
    values = [dict((one or {}).get("data") or {}) for one in (live, planned)]
    hidden = []
    for one, own, said in zip((live, planned), values, ("before", "after"), strict=True):
        same = {key for key in own if values[0].get(key) == values[1].get(key)}
        shown = {key: "(hidden)" if key in same else f"(hidden, {said})" for key in own}
        hidden.append({**one, "data": shown} if one is not None else None)
    return hidden[0], hidden[1]


def as_lines(document: Document) -> list[str]:
    """An object as YAML, without what only the server says."""
    kept: dict[str, Any] = copy.deepcopy({key: value for key, value in document.items() if key != "status"})
    metadata = kept.get("metadata", {})
    for key in _SERVERS_OWN:
        metadata.pop(key, None)
    annotations = {
        key: value for key, value in (metadata.pop("annotations", None) or {}).items() if key not in _NOISE
    }
    if annotations:
        metadata["annotations"] = annotations
    return yaml.safe_dump(kept, sort_keys=True, width=110).splitlines(keepends=True)
