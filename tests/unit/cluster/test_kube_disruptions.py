"""Nodes that will not stay, as Kubernetes and the parts of clouds say it."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube_disruptions import why_node_goes
from cluster.kube_objects import read_node


def a_node(
    *, taints: list[dict[str, str]] | None = None, conditions: list[dict[str, str]] | None = None
) -> Any:
    ready = {"type": "Ready", "status": "True"}
    return {
        "metadata": {"name": "n1"},
        "spec": {"taints": taints or []},
        "status": {"conditions": [ready, *(conditions or [])]},
    }


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("cloud.google.com/impending-node-termination", "is about to be terminated"),
        ("aws-node-termination-handler/spot-itn", "is a Spot instance that is interrupted"),
        ("karpenter.sh/disrupted", "is disrupted by Karpenter"),
        ("ToBeDeletedByClusterAutoscaler", "is taken away by the cluster autoscaler"),
        ("remediator.kubernetes.azure.com/unschedulable", "is being repaired"),
        ("nvidia.com/gpu", ""),
    ],
)
def test_taints(key: str, words: str) -> None:
    assert why_node_goes(read_node(a_node(taints=[{"key": key, "effect": "NoSchedule"}]))) == words
    assert why_node_goes(read_node(a_node(taints=[{"key": key, "effect": "PreferNoSchedule"}]))) == ""


@pytest.mark.parametrize(
    ("status", "message", "words"),
    [
        (
            "True",
            "Preempt Scheduled: Mon, 02 Mar 2026 19:01:45 GMT",
            "has a scheduled event (Preempt Scheduled: ",
        ),
        ("True", "", "has a scheduled event"),
        ("True", "Freeze Scheduled: Mon, 02 Mar 2026 19:01:45 GMT", ""),
        ("False", "VM has no scheduled event", ""),
    ],
)
def test_a_scheduled_event_of_a_vm(status: str, message: str, words: str) -> None:
    condition = {"type": "VMEventScheduled", "status": status, "message": message}
    found = why_node_goes(read_node(a_node(conditions=[condition])))
    assert found.startswith(words) if words else found == ""


def test_a_node_that_is_not_ready() -> None:
    gone = a_node()
    gone["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
    assert why_node_goes(read_node(gone)) == "is not ready"
    assert why_node_goes(read_node(a_node())) == ""
