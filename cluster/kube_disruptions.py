"""Which pods will not stay, and why: nodes that are drained, preempted, unreachable or deleted, pods that are.

Taints and conditions are those that the parts of a cluster set before they take a node away; each with who sets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from cluster.kube_objects import KubeNode, WorkerPod

_TAINTS: Final[Mapping[str, str]] = {
    # Kubernetes, "Taints and Tolerations", built-in ones. Pressure goes by and a network comes: not among them.
    "node.kubernetes.io/unreachable": "is unreachable",
    "node.kubernetes.io/not-ready": "is not ready",
    "node.kubernetes.io/unschedulable": "is cordoned",
    "node.kubernetes.io/out-of-service": "is out of service",
    "node.cloudprovider.kubernetes.io/shutdown": "is shut down",
    # The cluster autoscaler, once it has decided. Its DeletionCandidate... taint is no decision yet.
    "ToBeDeletedByClusterAutoscaler": "is taken away by the cluster autoscaler",
    # GKE: a Spot VM that is preempted, a VM that is maintained.
    "cloud.google.com/impending-node-termination": "is about to be terminated",
    # Karpenter 1.x, and its betas.
    "karpenter.sh/disrupted": "is disrupted by Karpenter",
    "karpenter.sh/disruption": "is disrupted by Karpenter",
    # AWS's node termination handler with `taintNode`.
    "aws-node-termination-handler/spot-itn": "is a Spot instance that is interrupted",
    "aws-node-termination-handler/scheduled-maintenance": "is to be maintained",
    "aws-node-termination-handler/asg-lifecycle-termination": "is terminated by its scaling group",
    "aws-node-termination-handler/rebalance-recommendation": "is likely to be interrupted",
    # AKS's node repair, and the name that its release notes announce in place of that.
    "remediator.aks.microsoft.com/unschedulable": "is being repaired",
    "remediator.kubernetes.azure.com/unschedulable": "is being repaired",
}
_CONDITIONS: Final[Mapping[str, str]] = {
    # AKS's node problem detector: a scheduled event of the VM; which one is in its message, "Preempt Scheduled: ...".
    "VMEventScheduled": "has a scheduled event",
}
# Such an event pauses a VM for seconds, and its pods stay.
_PAUSE: Final = "freeze"
# A soft taint is a wish.
_SOFT: Final = "PreferNoSchedule"


def why_node_goes(node: KubeNode) -> str:
    """Why a node will not stay, as words behind its name; "" if it stays."""
    for taint in node.taints:
        if taint.key in _TAINTS and taint.effect != _SOFT:
            return _TAINTS[taint.key]
    if node.going:
        return "is being deleted"
    if node.unschedulable:
        return "is cordoned"
    for condition, words in _CONDITIONS.items():
        why = node.conditions.get(condition)
        if why is not None and _PAUSE not in why.lower():
            return f"{words} ({why})" if why else words
    return "" if node.ready else "is not ready"


def going_pods(pods: Iterable[WorkerPod], nodes: Mapping[str, KubeNode] | None) -> dict[str, str]:
    """Names of pods that will not stay, each with the reason.

    Without `nodes`, which a cluster may keep from us, by what is seen of the pods alone.
    """
    found = {}
    for pod in pods:
        if why := _why_pod_goes(pod, nodes):
            found[pod.name] = why
    return found


def _why_pod_goes(pod: WorkerPod, nodes: Mapping[str, KubeNode] | None) -> str:
    if pod.going:
        return "the pod is being deleted"
    if pod.disrupted:
        return f"the pod is disrupted ({pod.disrupted})"
    if nodes is None or not pod.node:
        return ""
    node = nodes.get(pod.node)
    if node is None:
        return f"node {pod.node} is gone"
    why = why_node_goes(node)
    return f"node {pod.node} {why}" if why else ""
