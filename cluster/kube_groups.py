"""From what Kubernetes has and what the mesh wants to what is to be done: pure functions.

For every worker group of hosts:

1. It has a pod for every host that is wanted, and one more for each pod that will not stay, within its bounds.
2. More are asked for by a larger number. Fewer never are by the number alone: KubeRay would delete any pods. The pods
   to be deleted are named in the same patch, and the number falls by as many at most.
3. A pod is named only if it has no host and can get none: the mesh has drained its node and says that it is empty;
   or it never ran. Which ones: first those that will not stay, which are replaced if they are wanted.
4. Pods that will not stay are drained as soon as that is seen, surplus ones when they are empty, and what was drained
   for a reason that is over is given back.

Nothing is remembered from look to look: reasons of drains are kept by the mesh, what is to be deleted by the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.groups_report import GroupsReport, GroupState, NodeState
from cluster.kube_disruptions import going_pods
from cluster.kube_objects import Cluster, KubeNode, WorkerGroup, WorkerPod

MARK: Final = "kubernetes: "
"""How reasons of drains begin that are ours to end."""
NOT_NEEDED: Final = f"{MARK}the pod is not needed"


@dataclass(frozen=True, slots=True)
class Drain:
    """The mesh is to empty a node."""

    node_id: str
    pod: str
    reason: str


@dataclass(frozen=True, slots=True)
class Undrain:
    """Hosts may be placed on a node again."""

    node_id: str
    pod: str


@dataclass(frozen=True, slots=True)
class Resize:
    """A worker group is to have another number of pods, or loses some."""

    group: WorkerGroup
    """As it was seen: the patch is for it alone."""
    replicas: int
    deleted: tuple[str, ...]
    """Pods that go with this."""
    to_delete: tuple[str, ...]
    """All that KubeRay is to delete: those, and earlier ones that are not gone yet."""


@dataclass(frozen=True, slots=True)
class Todo:
    """What is to be done, in this order, and what is worth saying."""

    drains: tuple[Drain, ...] = ()
    undrains: tuple[Undrain, ...] = ()
    resizes: tuple[Resize, ...] = ()
    notes: tuple[str, ...] = ()
    going: Mapping[str, str] | None = None
    """Pods that will not stay, with the reason."""


def todo(
    cluster: Cluster,
    pods: Sequence[WorkerPod],
    nodes: Mapping[str, KubeNode] | None,
    mesh: GroupsReport,
) -> Todo:
    """What to do about a cluster. `nodes` is None where nodes can't be read."""
    going = going_pods(pods, nodes)
    parts = [
        _group_todo(group, _of(group, pods), going, mesh, patched=not cluster.autoscaled)
        for group in cluster.groups
        if group.host_group
    ]
    notes = [note for part in parts for note in part.notes]
    if cluster.autoscaled:
        notes.append("Ray's autoscaler changes the cluster, so that pods are drained here and not counted")
    head = next((pod for pod in pods if not pod.group), None)
    if head is not None and head.name in going:
        notes.append(f"the head pod {head.name} will not stay: {going[head.name]}")
    return Todo(
        tuple(drain for part in parts for drain in part.drains),
        tuple(undrain for part in parts for undrain in part.undrains),
        tuple(resize for part in parts for resize in part.resizes),
        tuple(notes),
        going,
    )


def _group_todo(
    group: WorkerGroup,
    pods: Sequence[WorkerPod],
    going: Mapping[str, str],
    mesh: GroupsReport,
    *,
    patched: bool,
) -> Todo:
    known = next((g for g in mesh.groups if g.name == group.host_group), None)
    if known is None:
        return Todo(
            notes=(f"worker group {group.name} is for host group {group.host_group}, which is unknown",)
        )
    listed = [pod.name for pod in pods if pod.name in group.to_delete]
    alive = [pod for pod in pods if pod.name not in listed]
    joined = {pod.name: _joined(pod, mesh) for pod in alive}
    drains = [
        Drain(node.node_id, pod.name, f"{MARK}{going[pod.name]}")
        for pod in alive
        if pod.name in going
        for node in joined[pod.name]
        # What somebody else drained is theirs, and empty as well.
        if not node.drained or (_ours(node) and node.reason != f"{MARK}{going[pod.name]}")
    ]
    if not patched or group.left_alone:
        notes = (f"worker group {group.name} is left alone: {group.left_alone}",) if group.left_alone else ()
        return Todo(tuple(drains), tuple(_undrains(alive, joined, going, ())), notes=notes)
    gone = [pod.name for pod in alive if pod.name in going and _deletable(pod, joined[pod.name], going)]
    keep = [pod for pod in alive if pod.name not in gone]
    wanted = _wanted(group, known, keep, going)
    surplus = _surplus(keep, joined, going, group.replicas - len(gone) - wanted)
    superfluous = [pod.name for pod in surplus if _deletable(pod, joined[pod.name], going)]
    drains += [
        Drain(node.node_id, pod.name, NOT_NEEDED)
        for pod in surplus
        if pod.name not in superfluous
        for node in joined[pod.name]
        if not node.drained
    ]
    deleted = (*gone, *superfluous)
    # Never below what KubeRay may have started, or it would delete any of them.
    replicas = max(wanted, group.replicas - len(deleted))
    resizes = []
    if deleted or replicas != group.replicas:
        resizes.append(Resize(group, replicas, deleted, (*listed, *deleted)))
    undrains = _undrains(alive, joined, going, {pod.name for pod in surplus})
    return Todo(tuple(drains), tuple(undrains), tuple(resizes), _bounded(group, known))


def _wanted(
    group: WorkerGroup, known: GroupState, keep: Sequence[WorkerPod], going: Mapping[str, str]
) -> int:
    """Pods that there should be, of those that stay and those that don't."""
    if known.wanted is None:
        # One host on every pod: how many pods is not the mesh's to say.
        return group.replicas
    extra = sum(pod.name in going for pod in keep)
    return min(max(known.wanted + extra, group.least), max(group.least, group.most))


def _surplus(
    keep: Sequence[WorkerPod],
    joined: Mapping[str, Sequence[NodeState]],
    going: Mapping[str, str],
    number: int,
) -> list[WorkerPod]:
    """So many pods without hosts, the same ones at every look: those that never ran, that are drained, the newest."""
    idle = [
        pod
        for pod in keep
        if pod.name not in going and not _hosts(joined[pod.name]) and (joined[pod.name] or _never_ran(pod))
    ]
    idle.sort(key=lambda pod: (pod.created, pod.name), reverse=True)
    idle.sort(key=lambda pod: (not _never_ran(pod), not all(node.drained for node in joined[pod.name])))
    return idle[: max(0, number)]


def _undrains(
    alive: Sequence[WorkerPod],
    joined: Mapping[str, Sequence[NodeState]],
    going: Mapping[str, str],
    surplus: Sequence[str] | set[str],
) -> list[Undrain]:
    return [
        Undrain(node.node_id, pod.name)
        for pod in alive
        if pod.name not in going and pod.name not in surplus
        for node in joined[pod.name]
        if node.drained and _ours(node)
    ]


def _deletable(pod: WorkerPod, joined: Sequence[NodeState], going: Mapping[str, str]) -> bool:
    """Whether a pod has no host, and can get none before it is gone."""
    if joined:
        return all(node.drained and not node.hosts for node in joined)
    # What is being deleted, and is no node of Ray's any more, is over.
    return _never_ran(pod) or pod.going


def _never_ran(pod: WorkerPod) -> bool:
    return pod.phase == "Pending" and not pod.ip


def _ours(node: NodeState) -> bool:
    return (node.reason or "").startswith(MARK)


def _hosts(joined: Sequence[NodeState]) -> int:
    return sum(len(node.hosts) for node in joined)


def _joined(pod: WorkerPod, mesh: GroupsReport) -> tuple[NodeState, ...]:
    """The Ray nodes that a pod is: two while a container that was started again is not yet known to be gone."""
    return tuple(node for node in mesh.nodes if pod.ip and node.ip == pod.ip)


def _of(group: WorkerGroup, pods: Sequence[WorkerPod]) -> list[WorkerPod]:
    return [pod for pod in pods if pod.group == group.name]


def _bounded(group: WorkerGroup, known: GroupState) -> tuple[str, ...]:
    if known.wanted is not None and known.wanted > max(group.least, group.most):
        return (f"host group {known.name} wants {known.wanted} pods, maxReplicas is {group.most}",)
    return ()
