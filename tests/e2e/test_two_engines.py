"""A version with a router of its own on trial: two engines on one set of hosts, each with one of the two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.checkpoint import Checkpoint
from tests.changed_model import changed_model
from tests.e2e.asking import Asking
from tests.e2e.programs import wait_for
from tests.e2e.version_mesh import Mesh, running_mesh

pytestmark = pytest.mark.slow


@pytest.fixture
def mesh(tiny_model: Path, tmp_path: Path) -> Iterator[Mesh]:
    texts = [f"text {n} that nobody learned from" for n in range(40)]
    (tmp_path / "holdout.txt").write_text("\n\n".join(texts))
    one_host = [{"name": "local", "count": 1, "threads": 1}]
    versions = {"holdout": str(tmp_path / "holdout.txt")}
    with running_mesh(
        tiny_model, tmp_path, engine={"replicas": 2}, hosts=one_host, versions=versions
    ) as mesh:
        yield mesh


@pytest.mark.long
def test_a_router_is_tried_out_on_some_users_while_the_others_have_theirs(mesh: Mesh, tmp_path: Path) -> None:
    digest, answers = mesh.answer()[0], mesh.answers()
    gates = [name for name in Checkpoint.open(mesh.model).tensors if ".gate.weight" in name]
    _, file = changed_model(mesh.model, tmp_path / "router", [(0, 1), (1, 0), (1, 3)], gates, seed=1)
    router = mesh.published(file, digest)
    mesh.stage(router)
    with Asking(mesh.client, answers) as asking:
        assert mesh.live("promote", router, "--canary", "50%")["candidate"] == router
        wait_for(lambda: {mesh.answer()[0] for _ in range(16)} == {digest, router}, 60, "both in use")
    assert [said for said in asking.wrong if "[" not in said] == [], (
        "no request failed; tokens are of either side"
    )
    sides = {user: mesh.answer(user=user)[0] for user in map(str, range(12))}
    assert set(sides.values()) == {digest, router}
    for user, side in sides.items():
        for _ in range(3):
            named, answer = mesh.answer(user=user)
            assert named == side and answer.json()["system_fingerprint"] == f"expertmesh-{side[:16]}"
    texts = {
        side: {
            mesh.answer(user=user)[1].json()["choices"][0]["text"] for user in sides if sides[user] == side
        }
        for side in (digest, router)
    }
    assert all(len(of_side) == 1 for of_side in texts.values()), (
        "each side says the same, whoever was asked first"
    )

    feedback = f"{mesh.server.url}/expertmesh/feedback"
    for user in sides:
        liked = mesh.answer(user=user)[1].json()["id"]
        assert httpx.post(feedback, json={"id": liked, "score": 1}).status_code == 204
    wait_for(lambda: min(mesh.status().seen) > 10, 60, "the controller to hear of both")
    wait_for(lambda: "quality" in mesh.status().verdict, 60, "held-out texts to be compared")
    mesh.rollback()
    assert {mesh.answer()[0] for _ in range(8)} == {digest} and mesh.answers() == answers
    assert "a test" in mesh.status().verdict
    mesh.promote(router)
    assert {mesh.answer()[0] for _ in range(8)} == {router} and mesh.answers() != answers
