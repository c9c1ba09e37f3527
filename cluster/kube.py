"""Kubernetes' API as the operator uses it: one narrow protocol over plain dicts, and the client behind it.

Works with the Python client's releases 36 and 37, whose `call_api` differ: only methods are called that both have, with
`_preload_content=False`, so that answers are JSON as the server sent it and no model classes are in the way. Leases
and events are reached as custom objects are, by their group's path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cluster.kube_credentials import credentials
from cluster.kube_errors import (
    AbsentError,
    ConflictError,
    ForbiddenError,
    GoneError,
    KubeError,
    UnavailableError,
)

Object = Mapping[str, Any]

# Writes end well before a lease does that was just renewed: see `cluster.leader`.
_CALL_S: Final = (3.0, 4.0)
_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of objects."""

    group: str
    """"" for the core."""
    version: str
    plural: str
    namespaced: bool = True


RAYSERVICES: Final = Resource("ray.io", "v1", "rayservices")
RAYCLUSTERS: Final = Resource("ray.io", "v1", "rayclusters")
PODS: Final = Resource("", "v1", "pods")
NODES: Final = Resource("", "v1", "nodes", namespaced=False)
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases")
EVENTS: Final = Resource("events.k8s.io", "v1", "events")


@dataclass(frozen=True, slots=True)
class Listed:
    """All objects of a kind, as of one version."""

    items: tuple[Object, ...]
    version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A change: ADDED, MODIFIED, DELETED, or BOOKMARK, which only says how far it is."""

    kind: str
    object: Object


class KubeApi(Protocol):
    """One namespace, and the cluster's nodes. Every call may raise any KubeError."""

    namespace: str

    def list_all(self, resource: Resource) -> Listed: ...
    def get(self, resource: Resource, name: str) -> Object: ...

    def watch(self, resource: Resource, version: str, timeout_s: float) -> Iterator[WatchEvent]:
        """Changes since a version, until the time is over or the connection ends."""

    def create(self, resource: Resource, body: Object) -> Object: ...

    def replace(self, resource: Resource, name: str, body: Object) -> Object:
        """ConflictError if `body` has another resourceVersion than the object by now."""

    def patch(self, resource: Resource, name: str, body: list[dict[str, Any]] | dict[str, Any]) -> Object:
        """A list is a JSON patch (RFC 6902), a dict a merge patch (RFC 7386)."""


def refusal(status: int, what: str, message: str) -> KubeError:
    """The error for an HTTP status; `what` was to be done."""
    text = f"can't {what}: {message}"
    if status == 410:
        return GoneError(text)
    if status == 409 or (status == 422 and "test" in message.lower()):
        return ConflictError(text)
    if status in (401, 403):
        return ForbiddenError(text, "the operator's Role must allow it; the chart expertmesh-operator's does")
    if status == 404:
        return AbsentError(text)
    if status == 429 or status >= 500 or status == 0:
        return UnavailableError(text)
    return KubeError(text)


class KubernetesApi:
    """Over a configured `kubernetes.client.ApiClient`."""

    def __init__(self, client: Any, namespace: str) -> None:
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self.namespace = namespace
        self._core, self._custom = CoreV1Api(client), CustomObjectsApi(client)

    def list_all(self, resource: Resource) -> Listed:
        items: list[Object] = []
        more = ""
        while True:
            options = {"_continue": more} if more else {}
            page = self._call("list", resource, "", limit=_PAGE, **options)
            items += page.get("items") or ()
            more = page.get("metadata", {}).get("continue") or ""
            if not more:
                return Listed(tuple(items), str(page["metadata"]["resourceVersion"]))

    def get(self, resource: Resource, name: str) -> Object:
        return self._call("get", resource, name)

    def watch(self, resource: Resource, version: str, timeout_s: float) -> Iterator[WatchEvent]:
        response = self._response(
            "list",
            resource,
            "",
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=max(1, int(timeout_s)),
            # The server ends it in time; a connection that is dead says nothing at all.
            _request_timeout=(_CALL_S[0], timeout_s + 10),
        )
        try:
            yield from _events(resource, _lines(response))
        finally:
            response.close()

    def create(self, resource: Resource, body: Object) -> Object:
        return self._call("create", resource, "", body=dict(body))

    def replace(self, resource: Resource, name: str, body: Object) -> Object:
        return self._call("replace", resource, name, body=dict(body))

    def patch(self, resource: Resource, name: str, body: list[dict[str, Any]] | dict[str, Any]) -> Object:
        kind = "json-patch" if isinstance(body, list) else "merge-patch"
        return self._call("patch", resource, name, body=body, _content_type=f"application/{kind}+json")

    def _call(self, verb: str, resource: Resource, name: str, **options: Any) -> Any:
        response = self._response(verb, resource, name, **options)
        broken: tuple[type[Exception], ...] = (*_transport_errors(), ValueError)
        try:
            return json.loads(response.data)
        except broken as error:
            raise UnavailableError(f"can't {_words(verb, resource, name)}: {error}") from error
        finally:
            response.release_conn()

    def _response(self, verb: str, resource: Resource, name: str, **options: Any) -> Any:
        from kubernetes.client.exceptions import ApiException

        method, given = self._method(verb, resource)
        verb = "watch" if options.get("watch") else verb
        if name:
            given["name"] = name
        try:
            return method(**given, **{"_request_timeout": _CALL_S, **options, "_preload_content": False})
        except ApiException as error:
            raise refusal(int(error.status or 0), _words(verb, resource, name), _said(error)) from error
        except _transport_errors() as error:
            raise UnavailableError(f"can't {_words(verb, resource, name)}: {error}") from error

    def _method(self, verb: str, resource: Resource) -> tuple[Any, dict[str, Any]]:
        if not resource.group:
            # Pods and nodes are only read.
            scope = "namespaced_pod" if resource.namespaced else "node"
            given = {"namespace": self.namespace} if resource.namespaced else {}
            return getattr(self._core, f"{'read' if verb == 'get' else verb}_{scope}"), given
        given = {
            "group": resource.group,
            "version": resource.version,
            "namespace": self.namespace,
            "plural": resource.plural,
        }
        return getattr(self._custom, f"{verb}_namespaced_custom_object"), given


def connect(kubeconfig: Path | None, context: str | None, namespace: str | None) -> KubernetesApi:
    """Connect to the cluster of `credentials`; KubeError if there is none. `namespace` if not its own."""
    from kubernetes import client

    settings, own = credentials(kubeconfig, context)
    # Who calls decides about trying again, with pauses that grow.
    settings.retries = False
    return KubernetesApi(client.ApiClient(settings), namespace or own)


def _transport_errors() -> tuple[type[Exception], ...]:
    from urllib3.exceptions import HTTPError

    return HTTPError, OSError


def _lines(response: Any) -> Iterator[bytes]:
    kept = b""
    try:
        for chunk in response.stream(amt=None, decode_content=False):
            *whole, kept = (kept + chunk).split(b"\n")
            yield from whole
    except _transport_errors() as error:
        raise UnavailableError(f"the watch ended: {error}") from error


def _events(resource: Resource, lines: Iterator[bytes]) -> Iterator[WatchEvent]:
    for line in lines:
        if not line.strip():
            continue
        event = json.loads(line)
        if event["type"] == "ERROR":
            status = event["object"]
            raise refusal(
                int(status.get("code", 0)), f"watch {resource.plural}", str(status.get("message", ""))
            )
        yield WatchEvent(str(event["type"]), event["object"])


def _words(verb: str, resource: Resource, name: str) -> str:
    """As a Role calls it."""
    return f"{'update' if verb == 'replace' else verb} {resource.plural}{f' {name}' if name else ''}"


def _said(error: Any) -> str:
    """What the server said, which is a Status object as JSON, or else the reason."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.body or error.reason or error)
