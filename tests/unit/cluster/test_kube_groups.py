"""What is decided about worker groups: by example, and whatever a cluster and a mesh may look like."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.groups_report import GroupsReport, GroupState, NodeState
from cluster.kube_groups import MARK, NOT_NEEDED, Resize, Todo, todo
from cluster.kube_objects import Cluster, KubeNode, Taint, WorkerGroup, WorkerPod

GROUP = WorkerGroup(0, "cpu", "cpu", 2, 1, 4, given=frozenset({"replicas"}))


def a_pod(number: int, **more: object) -> WorkerPod:
    return replace(WorkerPod(f"p{number}", "cpu", f"10.0.0.{number}", f"n{number}"), **more)  # type: ignore[arg-type]


def a_node(number: int, *hosts: str, drained: bool = False, reason: str | None = None) -> NodeState:
    return NodeState(f"r{number}", f"10.0.0.{number}", f"p{number}", hosts, (), drained, reason)


def decided(
    pods: list[WorkerPod],
    nodes: list[NodeState],
    wanted: int | None,
    group: WorkerGroup = GROUP,
    kube_nodes: dict[str, KubeNode] | None = None,
    autoscaled: bool = False,
) -> Todo:
    mesh = GroupsReport("m", "run", 1, (GroupState("cpu", 2, 2, wanted),), tuple(nodes))
    return todo(Cluster("c", "10.0.0.9", "", autoscaled, (group,)), pods, kube_nodes, mesh)


def fleet(*going: str, kube: int = 4) -> dict[str, KubeNode]:
    names = [f"n{number}" for number in range(1, kube + 1)]
    return {name: KubeNode(name, unschedulable=name in going) for name in names}


BOTH = [a_node(1, "cpu-0"), a_node(2, "cpu-1")]


def test_a_mesh_that_has_what_it_wants_is_left_as_it_is() -> None:
    found = decided([a_pod(1), a_pod(2)], BOTH, 2, kube_nodes=fleet())
    assert found == Todo(going={})


def test_more_pods_are_asked_for_up_to_the_bound() -> None:
    assert decided([a_pod(1), a_pod(2)], BOTH, 3).resizes == (Resize(GROUP, 3, (), ()),)
    found = decided([a_pod(1), a_pod(2)], BOTH, 9)
    assert found.resizes == (Resize(GROUP, 4, (), ()),)
    assert found.notes == ("host group cpu wants 9 pods, maxReplicas is 4",)


def test_a_surplus_pod_is_drained_first_and_then_named() -> None:
    group = replace(GROUP, replicas=3)
    pods = [a_pod(1), a_pod(2), a_pod(3)]
    found = decided(pods, [*BOTH, a_node(3)], 2, group)
    assert [(d.node_id, d.reason) for d in found.drains] == [("r3", NOT_NEEDED)] and not found.resizes
    found = decided(pods, [*BOTH, a_node(3, drained=True, reason=NOT_NEEDED)], 2, group)
    assert found.resizes == (Resize(group, 2, ("p3",), ("p3",)),) and not found.drains
    # It is wanted after all.
    found = decided(pods, [*BOTH, a_node(3, drained=True, reason=NOT_NEEDED)], 3, group)
    assert [u.node_id for u in found.undrains] == ["r3"] and not found.resizes
    # A host is on its way out of it.
    found = decided(pods, [*BOTH, a_node(3, "cpu-2", drained=True, reason=NOT_NEEDED)], 2, group)
    assert not found.resizes


def test_no_pod_with_hosts_goes_however_few_are_wanted() -> None:
    found = decided([a_pod(1), a_pod(2)], BOTH, 1)
    assert not found.drains and not found.resizes


def test_a_pod_that_never_ran_goes_first() -> None:
    group = replace(GROUP, replicas=4)
    waiting = a_pod(4, ip="", node="", phase="Pending", ready=False)
    found = decided([a_pod(1), a_pod(2), a_pod(3), waiting], [*BOTH, a_node(3)], 3, group)
    assert found.resizes == (Resize(group, 3, ("p4",), ("p4",)),)


def test_a_pod_whose_container_just_started_is_waited_for() -> None:
    """It has an address, and may be a node of Ray's at any moment."""
    group = replace(GROUP, replicas=3)
    assert decided([a_pod(1), a_pod(2), a_pod(3)], BOTH, 2, group) == Todo(going={})


def test_a_node_that_will_not_stay_is_emptied_beside_a_new_pod_and_then_given_up() -> None:
    pods = [a_pod(1), a_pod(2)]
    found = decided(pods, BOTH, 2, kube_nodes=fleet("n2"))
    assert [(d.node_id, d.reason) for d in found.drains] == [("r2", f"{MARK}node n2 is cordoned")]
    assert [r.replicas for r in found.resizes] == [3]
    more = replace(GROUP, replicas=3)
    going = a_node(2, drained=True, reason=f"{MARK}node n2 is cordoned")
    found = decided([*pods, a_pod(3)], [BOTH[0], going, a_node(3, "cpu-2")], 2, more, fleet("n2"))
    assert found.resizes == (Resize(more, 2, ("p2",), ("p2",)),)
    # The node stays after all.
    found = decided(pods, [BOTH[0], going], 2, kube_nodes=fleet())
    assert [u.node_id for u in found.undrains] == ["r2"]


def test_a_group_at_its_bound_has_the_pod_replaced() -> None:
    full = replace(GROUP, least=2, most=2)
    going = a_node(2, drained=True, reason=f"{MARK}node n2 is cordoned")
    found = decided([a_pod(1), a_pod(2)], [BOTH[0], going], 2, full, fleet("n2"))
    assert found.resizes == (Resize(full, 2, ("p2",), ("p2",)),)


def test_what_somebody_else_drained_is_theirs() -> None:
    found = decided([a_pod(1), a_pod(2)], [BOTH[0], a_node(2, drained=True)], 2, kube_nodes=fleet("n2"))
    assert not found.drains
    found = decided([a_pod(1), a_pod(2)], [BOTH[0], a_node(2, drained=True, reason="mine")], 2)
    assert not found.undrains


def test_names_stay_in_the_list_until_their_pods_are_gone() -> None:
    group = replace(GROUP, replicas=2, to_delete=("p3", "old"))
    waiting = a_pod(4, ip="", node="", phase="Pending")
    found = decided([a_pod(1), a_pod(3), waiting], [BOTH[0]], 1, group)
    assert found.resizes == (Resize(group, 1, ("p4",), ("p3", "p4")),)


def test_pods_and_taints_that_say_that_they_go() -> None:
    spot = KubeNode("n2", taints=(Taint("cloud.google.com/impending-node-termination", "NoSchedule"),))
    soft = KubeNode("n1", taints=(Taint("karpenter.sh/disrupted", "PreferNoSchedule"),))
    pods = [a_pod(1), a_pod(2), a_pod(3, going=True), a_pod(4, disrupted="PreemptionByScheduler")]
    found = decided(pods, [], 4, replace(GROUP, replicas=4), {**fleet(), "n1": soft, "n2": spot})
    assert found.going is not None and set(found.going) == {"p2", "p3", "p4"}
    # Without nodes, by the pods alone.
    found = decided(pods, [], 4, replace(GROUP, replicas=4))
    assert found.going is not None and set(found.going) == {"p3", "p4"}


def test_what_is_somebody_elses_is_not_counted() -> None:
    pods = [a_pod(1), a_pod(2)]
    found = decided(pods, BOTH, 4, kube_nodes=fleet("n2"), autoscaled=True)
    assert not found.resizes and len(found.drains) == 1 and "Ray's autoscaler" in found.notes[0]
    found = decided(pods, BOTH, 4, replace(GROUP, left_alone="it is suspended"))
    assert not found.resizes and "suspended" in found.notes[0]
    found = decided(pods, BOTH, None, kube_nodes=fleet())
    assert found == Todo(going={})
    unknown = replace(GROUP, host_group="other")
    assert "unknown" in decided(pods, BOTH, 4, unknown).notes[0]


@st.composite
def situations(
    draw: st.DrawFn,
) -> tuple[list[WorkerPod], list[NodeState], int, WorkerGroup, dict[str, KubeNode]]:
    least = draw(st.integers(0, 3))
    most = draw(st.integers(least, 6))
    replicas = draw(st.integers(0, 6))
    pods, nodes, listed = [], [], []
    for number in range(draw(st.integers(0, replicas))):
        ran = draw(st.booleans())
        pod = a_pod(number, going=draw(st.booleans()))
        if not ran:
            pod = replace(pod, ip="", phase="Pending")
        elif draw(st.booleans()):
            drained = draw(st.booleans())
            reason = draw(st.sampled_from([None, "mine", NOT_NEEDED])) if drained else None
            hosts = (f"cpu-{number}",) if draw(st.booleans()) else ()
            nodes.append(a_node(number, *hosts, drained=drained, reason=reason))
        pods.append(pod)
    for number in range(10, 10 + draw(st.integers(0, 2))):
        pods.append(a_pod(number))
        listed.append(f"p{number}")
    group = WorkerGroup(0, "cpu", "cpu", replicas, least, most, tuple(listed))
    cordoned = draw(st.lists(st.integers(0, 12), max_size=3))
    kube = {f"n{n}": KubeNode(f"n{n}", unschedulable=n in cordoned) for n in range(13)}
    return pods, nodes, draw(st.integers(0, 8)), group, kube


@given(situations())
def test_whatever_there_is_no_pod_goes_that_was_not_empty_and_named(
    case: tuple[list[WorkerPod], list[NodeState], int, WorkerGroup, dict[str, KubeNode]],
) -> None:
    pods, nodes, wanted, group, kube = case
    found = decided(pods, nodes, wanted, group, kube)
    by_ip = {node.ip: node for node in nodes}
    assert len(found.resizes) <= 1
    for resize in found.resizes:
        alive = [pod for pod in pods if pod.name not in group.to_delete]
        left = [pod for pod in alive if pod.name not in resize.deleted]
        assert len(left) <= resize.replicas, "KubeRay would delete any of them"
        assert resize.replicas >= group.replicas - len(resize.deleted)
        assert resize.replicas <= max(group.most, group.replicas)
        assert set(resize.to_delete) >= {p.name for p in pods if p.name in group.to_delete}
        for name in resize.deleted:
            pod = next(p for p in alive if p.name == name)
            node = by_ip.get(pod.ip) if pod.ip else None
            assert (node.drained and not node.hosts) if node else (pod.phase == "Pending" or pod.going)
    for undrain in found.undrains:
        assert next(n for n in nodes if n.node_id == undrain.node_id).reason == NOT_NEEDED
    assert not {d.node_id for d in found.drains} & {u.node_id for u in found.undrains}
