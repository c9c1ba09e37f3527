"""What of a mesh is shown on its RayService: annotations, pure functions.

They change with the mesh and not with the time: every change has KubeRay look at the RayService.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.groups_report import GroupsReport
from cluster.kube_groups import Todo

# Longer texts are for the admin API and the log.
_MESSAGE = 400


def serving(mesh: GroupsReport, todo: Todo) -> dict[str, str]:
    """Of a mesh that answers."""
    drained = {node.hostname: node.reason or "" for node in mesh.nodes if node.drained}
    ready = sum(group.ready for group in mesh.groups)
    wanted = sum(group.hosts if group.wanted is None else group.wanted for group in mesh.groups)
    stuck = sorted({node.stuck for node in mesh.nodes if node.stuck})
    lacking = [f"{group.name}: {group.waiting_for}" for group in mesh.groups if group.waiting_for]
    details: dict[str, Any] = {
        "model": mesh.served_name,
        "groups": {
            group.name: {"ready": group.ready, "hosts": group.hosts, "wanted": group.wanted}
            for group in mesh.groups
        },
    }
    if drained:
        details["drained"] = dict(sorted(drained.items()))
    if todo.going:
        details["leaving"] = dict(sorted(todo.going.items()))
    changing = mesh.change or any(node.leaving for node in mesh.nodes) or ready < wanted
    return _annotations(
        "Changing" if changing else "Serving",
        "; ".join([*todo.notes, *stuck, *lacking]),
        {"hosts": f"{ready}/{wanted}", "status": json.dumps(details, separators=(",", ":"))},
    )


def starting(why: str) -> dict[str, str]:
    """Of a mesh whose hosts load, or that has no cluster yet."""
    return _annotations("Starting", why, {})


def unreachable(why: str) -> dict[str, str]:
    """Of a mesh whose admin API does not answer."""
    return _annotations("Unknown", why, {})


def _annotations(phase: str, message: str, more: Mapping[str, str]) -> dict[str, str]:
    return {"phase": phase, **({"message": message[:_MESSAGE]} if message else {}), **more}
