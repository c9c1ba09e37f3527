"""Groups and nodes over the admin API: what is wanted, drains with others in place, scaling as nodes join."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.errors import PlacementError
from cluster.node_shape import NodeShape
from tests.operated_mesh import OperatedMesh, ray_node


@pytest.fixture
def mesh() -> Iterator[OperatedMesh]:
    mesh = OperatedMesh()
    yield mesh
    mesh.running.close()


def ok(answer: httpx.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()


def groups(mesh: OperatedMesh) -> dict[str, Any]:
    return {group["name"]: group for group in ok(mesh.client.get("/groups"))["groups"]}


def test_groups_and_nodes_are_told(mesh: OperatedMesh) -> None:
    report = mesh.admin.groups()
    assert [(g.name, g.hosts, g.ready, g.wanted) for g in report.groups] == [("a", 2, 2, 2), ("b", 1, 1, 1)]
    assert [(n.hostname, n.hosts, n.drained) for n in report.nodes] == [
        ("a1", ("a-0",), False),
        ("a2", ("a-1",), False),
        ("b1", ("b-0",), False),
    ]
    mesh.external.request({"a": NodeShape(4, 1)})
    assert groups(mesh)["a"]["wanted"] == 4
    assert "room for a 4 × (1 CPU)" in mesh.external.describe()


def test_a_group_grows_as_nodes_join_each_with_one_host(mesh: OperatedMesh) -> None:
    answer = ok(mesh.client.post("/groups/a/scale", json={"hosts": 4}), 202)
    assert (answer["coming"], answer["lacking"]) == ([], 2), "memory would do for more on the nodes there are"
    assert groups(mesh)["a"]["wanted"] == 4 and "a node each" in groups(mesh)["a"]["waiting_for"]
    mesh.nodes += (ray_node("a3", "a", "10.1.0.7"),)
    mesh.go_on()
    assert mesh.where()["a-2"] == "a3" and groups(mesh)["a"]["hosts"] == 3
    mesh.nodes += (ray_node("a4", "a", "10.1.0.8"),)
    mesh.go_on()
    assert mesh.where()["a-3"] == "a4" and groups(mesh)["a"]["wanted"] == 4
    assert not mesh.running.deployment().wishes  # type: ignore[union-attr]


def test_a_group_shrinks_at_once_and_a_wish_for_more_is_over(mesh: OperatedMesh) -> None:
    ok(mesh.client.post("/groups/a/scale", json={"hosts": 5}), 202)
    assert ok(mesh.client.post("/groups/a/scale", json={"hosts": 1}), 202)["leaving"] == ["a-1"]
    mesh.go_on()
    assert groups(mesh)["a"]["wanted"] == 1 and "a-1" not in mesh.where()


def test_a_drained_node_s_hosts_are_replaced_on_the_next_one(mesh: OperatedMesh) -> None:
    answer = ok(mesh.client.post("/nodes/a2/drain", json={"reason": "kubernetes: cordoned"}), 202)
    assert (answer["leaving"], answer["staying"]) == (["a-1"], [])
    mesh.go_on()
    report = mesh.admin.groups()
    drained = next(node for node in report.nodes if node.hostname == "a2")
    assert (drained.drained, drained.hosts, drained.reason) == (True, (), "kubernetes: cordoned")
    assert (groups(mesh)["a"]["hosts"], groups(mesh)["a"]["wanted"]) == (1, 2)
    mesh.nodes += (ray_node("a3", "a", "10.1.0.7"),)
    mesh.go_on()
    assert mesh.where()["a-1"] == "a3" and groups(mesh)["a"]["wanted"] == 2
    ok(mesh.client.delete("/nodes/a2/drain"))
    assert not any(node.drained for node in mesh.admin.groups().nodes)


def test_a_new_controller_goes_on_with_what_was_wished(mesh: OperatedMesh) -> None:
    ok(mesh.client.post("/nodes/a2/drain", json={"reason": "r"}), 202)
    found = mesh.controller().deployment()
    assert found is not None and (found.wishes, found.evacuated) == ({"a": 2}, {"ray-a2": "r"})


def test_a_node_that_is_gone_is_forgotten(mesh: OperatedMesh) -> None:
    ok(mesh.client.post("/nodes/a2/drain"), 202)
    mesh.go_on()
    mesh.nodes = tuple(node for node in mesh.nodes if node.hostname != "a2")
    mesh.go_on()
    deployment = mesh.running.deployment()
    assert deployment is not None and not deployment.evacuated and not deployment.limits.drained


def test_hosts_that_nobody_can_stand_in_for_stay_until_somebody_can(
    mesh: OperatedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def no_room(*_: object) -> None:
            raise PlacementError("layer 2, expert 0: no host")

        patched.setattr(mesh.rebalancer, "_try_without", no_room)
        answer = ok(mesh.client.post("/nodes/b1/drain"), 202)
        assert (answer["leaving"], answer["staying"]) == ([], ["b-0"]) and "no host" in answer["why"]
        mesh.go_on()
        assert next(n for n in mesh.admin.groups().nodes if n.hostname == "b1").stuck
    mesh.go_on(20)
    assert "b-0" not in mesh.where()


def test_hosts_that_share_a_node_part_when_there_is_another(mesh: OperatedMesh) -> None:
    lost = mesh.nodes[1]
    mesh.nodes = tuple(node for node in mesh.nodes if node is not lost)
    mesh.kill("a-1")
    mesh.go_on()
    assert [name for name in mesh.where().values()].count("a1") == 2
    mesh.nodes += (ray_node("a3", "a", "10.1.0.7"),)
    mesh.go_on(8)
    assert sorted(mesh.where().values()) == ["a1", "a3", "b1"]


def test_the_autoscaler_is_refused_what_has_no_node_of_its_own(mesh: OperatedMesh) -> None:
    with pytest.raises(PlacementError, match="need a node each"):
        mesh.wishes.scale_now("a", 3)
    mesh.nodes += (ray_node("a3", "a", "10.1.0.7"),)
    mesh.go_on()
    mesh.wishes.scale_now("a", 3)
    assert mesh.where()["a-2"] == "a3"
    mesh.wishes.scale_now("a", 2)
    assert "a-2" in mesh.running.deployment().leaving  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/groups/no/scale", {"hosts": 1}, 422, "no host group no"),
        ("POST", "/groups/a/scale", {"hosts": -1}, 422, "body.hosts"),
        ("POST", "/groups/a/scale", {"count": 1}, 422, "body.count"),
        ("POST", "/nodes/no/drain", {}, 422, "no node no"),
        ("DELETE", "/nodes/no/drain", None, 422, "no node no"),
    ],
)
def test_what_can_not_be_is_refused(
    mesh: OperatedMesh, method: str, path: str, body: dict[str, Any] | None, status: int, words: str
) -> None:
    answer = mesh.client.request(method, path, json=body)
    assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_before_anything_serves_it_says_so(mesh: OperatedMesh) -> None:
    mesh.running.stop()
    answer = mesh.client.get("/groups")
    assert answer.status_code == 409 and "nothing is deployed" in answer.json()["error"]["message"]
