"""What the operator writes: JSON patches of RayClusters, annotations of RayServices, events. Pure functions.

`workerGroupSpecs` is an atomic list, without a key: a group is patched by its index, and a `test` says which group was
meant and what it was like when that was decided. Where it changed meanwhile the whole patch is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from cluster.kube_groups import Resize
from cluster.kube_objects import Service

PREFIX: Final = "expertmesh.io/"
# For so long an event that is said again is the same event, whichever operator says it.
_EVENT_S: Final = 600
# Kubernetes' limit for an event's note is 1 KiB.
_NOTE: Final = 1000


def resize_patch(resize: Resize) -> list[dict[str, Any]]:
    """The number of pods, and the pods that go, in one patch that somebody else's change makes fail."""
    group = resize.group
    at = f"/spec/workerGroupSpecs/{group.index}"
    patch: list[dict[str, Any]] = [{"op": "test", "path": f"{at}/groupName", "value": group.name}]
    if "replicas" in group.given:
        patch.append({"op": "test", "path": f"{at}/replicas", "value": group.replicas})
    if "workersToDelete" in group.given:
        path = f"{at}/scaleStrategy/workersToDelete"
        patch.append({"op": "test", "path": path, "value": list(group.to_delete)})
    patch.append({"op": "add", "path": f"{at}/replicas", "value": resize.replicas})
    if resize.deleted:
        names = list(resize.to_delete)
        if "scaleStrategy" in group.given:
            patch.append({"op": "add", "path": f"{at}/scaleStrategy/workersToDelete", "value": names})
        else:
            patch.append({"op": "add", "path": f"{at}/scaleStrategy", "value": {"workersToDelete": names}})
    return patch


def annotations_patch(service: Service, wanted: Mapping[str, str]) -> dict[str, Any] | None:
    """A merge patch that gives a RayService these annotations, and no other of ours; None if it has them."""
    ours = {key: value for key, value in service.annotations.items() if key.startswith(PREFIX)}
    new = {PREFIX + key: value for key, value in wanted.items()}
    changed: dict[str, str | None] = {key: value for key, value in new.items() if ours.get(key) != value}
    # What the operator once wrote and doesn't any more; the chart's own annotations are not its to take.
    changed |= {key: None for key in ours if key not in new and key in _ALL}
    return {"metadata": {"annotations": changed}} if changed else None


# Every annotation that the operator writes.
KEYS: Final = ("phase", "hosts", "message", "status")
_ALL: Final = frozenset(PREFIX + key for key in KEYS)


def event(
    service: Service, namespace: str, identity: str, reason: str, note: str, now: datetime, *, warning: bool
) -> dict[str, Any]:
    """An event of events.k8s.io about a RayService.

    Its name is made of what it says and of the time in tens of minutes, so that it can't be made twice.
    """
    window = int(now.timestamp()) // _EVENT_S
    same = f"{service.uid} {reason} {note} {window}"
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{service.name}.{hashlib.sha256(same.encode()).hexdigest()[:16]}",
            "namespace": namespace,
        },
        "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{PREFIX}operator",
        "reportingInstance": identity[:128],
        "action": reason,
        "reason": reason,
        "note": note[:_NOTE],
        "type": "Warning" if warning else "Normal",
        "regarding": {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "name": service.name,
            "namespace": namespace,
            "uid": service.uid,
        },
    }
