"""Kubernetes' API in memory: versions, conflicts, JSON and merge patches, watches that end in 410, permissions."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

from cluster.kube import Listed, Object, Resource, WatchEvent, refusal
from cluster.kube_errors import KubeError

Verb = tuple[str, str, str]
"""API group, plural, verb: as a Role has them."""


class FakeKube:
    """One namespace. Calls may come from several threads."""

    def __init__(self, namespace: str = "mesh") -> None:
        self.namespace = namespace
        self.used: set[Verb] = set()
        self.denied: set[Verb] = set()
        self.away = False
        """Whether it answers nothing, as while it is started again."""
        self._changed = threading.Condition(threading.RLock())
        self._objects: dict[tuple[Resource, str], dict[str, Any]] = {}
        self._log: list[tuple[int, Resource, WatchEvent]] = []
        self._version, self._forgotten = 100, 0

    def put(self, resource: Resource, body: Object) -> None:
        """Make or change an object from outside, whatever the client may."""
        with self._changed:
            self._store(resource, copy.deepcopy(dict(body)))

    def remove(self, resource: Resource, name: str) -> None:
        """Delete an object from outside."""
        with self._changed:
            gone = self._objects.pop((resource, name))
            self._note(resource, "DELETED", gone)

    def object(self, resource: Resource, name: str) -> dict[str, Any]:
        """A copy of an object."""
        with self._changed:
            return copy.deepcopy(self._objects[resource, name])

    def objects(self, resource: Resource) -> list[dict[str, Any]]:
        """Copies of all of a kind."""
        with self._changed:
            return [copy.deepcopy(o) for (kind, _), o in self._objects.items() if kind == resource]

    def forget(self) -> None:
        """Let no watch go on from what was before: 410."""
        with self._changed:
            self._forgotten = self._version
            self._log.clear()
            self._changed.notify_all()

    def end_watches(self) -> None:
        """Wake watches, so that they see that the server is away."""
        with self._changed:
            self._changed.notify_all()

    def list_all(self, resource: Resource) -> Listed:
        with self._changed:
            self._asked("list", resource)
            items = [copy.deepcopy(o) for (kind, _), o in self._objects.items() if kind == resource]
            return Listed(tuple(items), str(self._version))

    def get(self, resource: Resource, name: str) -> Object:
        with self._changed:
            self._asked("get", resource)
            return copy.deepcopy(self._found(resource, name))

    def watch(self, resource: Resource, version: str, timeout_s: float) -> Iterator[WatchEvent]:
        since = int(version)
        while True:
            with self._changed:
                self._asked("watch", resource)
                if since < self._forgotten:
                    raise refusal(410, f"watch {resource.plural}", "too old resource version")
                news = [(at, event) for at, kind, event in self._log if kind == resource and at > since]
                if not news and not self._changed.wait(timeout_s):
                    return
            for at, event in news:
                since = at
                yield copy.deepcopy(event)

    def create(self, resource: Resource, body: Object) -> Object:
        with self._changed:
            self._asked("create", resource)
            name = str(body["metadata"]["name"])
            if (resource, name) in self._objects:
                raise refusal(409, f"create {resource.plural}", f"{name} already exists")
            return copy.deepcopy(self._store(resource, copy.deepcopy(dict(body))))

    def replace(self, resource: Resource, name: str, body: Object) -> Object:
        with self._changed:
            self._asked("update", resource)
            now = self._found(resource, name)
            version = body["metadata"].get("resourceVersion")
            if version not in (None, now["metadata"]["resourceVersion"]):
                raise refusal(409, f"replace {name}", "the object has been modified")
            return copy.deepcopy(self._store(resource, copy.deepcopy(dict(body))))

    def patch(self, resource: Resource, name: str, body: list[dict[str, Any]] | dict[str, Any]) -> Object:
        with self._changed:
            self._asked("patch", resource)
            now = copy.deepcopy(self._found(resource, name))
            if isinstance(body, list):
                for operation in body:
                    _apply(now, operation)
            else:
                _merge(now, body)
            if now == self._objects[resource, name]:
                return now
            return copy.deepcopy(self._store(resource, now))

    def _asked(self, verb: str, resource: Resource) -> None:
        if self.away:
            raise refusal(0, f"{verb} {resource.plural}", "connection refused")
        asked = resource.group, resource.plural, verb
        if asked in self.denied:
            raise refusal(403, f"{verb} {resource.plural}", "forbidden")
        self.used.add(asked)

    def _found(self, resource: Resource, name: str) -> dict[str, Any]:
        if (resource, name) not in self._objects:
            raise refusal(404, f"get {resource.plural}", f"{name} not found")
        return self._objects[resource, name]

    def _store(self, resource: Resource, body: dict[str, Any]) -> dict[str, Any]:
        name = str(body["metadata"]["name"])
        known = (resource, name) in self._objects
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        body["metadata"].setdefault("uid", f"uid-{name}")
        self._objects[resource, name] = body
        self._log.append(
            (
                self._version,
                resource,
                WatchEvent("MODIFIED" if known else "ADDED", copy.deepcopy(body)),
            )
        )
        self._changed.notify_all()
        return body

    def _note(self, resource: Resource, kind: str, body: dict[str, Any]) -> None:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._log.append((self._version, resource, WatchEvent(kind, body)))
        self._changed.notify_all()


def _apply(document: dict[str, Any], operation: dict[str, Any]) -> None:
    """`test` and `add` of RFC 6902, as the API server answers them."""
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    try:
        for part in above:
            place = place[int(part) if isinstance(place, list) else part]
        key: Any = int(last) if isinstance(place, list) else last
        if operation["op"] == "test":
            if place[key] != operation["value"]:
                raise refusal(422, "patch", f"testing value {operation['path']} failed")
        else:
            assert operation["op"] == "add" and isinstance(place, dict)
            place[key] = copy.deepcopy(operation["value"])
    except (KeyError, IndexError) as error:
        raise KubeError(f"can't patch: no {error} in {operation['path']}") from error


def _merge(document: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if value is None:
            document.pop(key, None)
        elif isinstance(value, dict):
            _merge(document.setdefault(key, {}), value)
        else:
            document[key] = value
