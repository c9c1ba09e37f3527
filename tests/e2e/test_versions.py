"""Versions of a mesh that serves: loaded, promoted under load, rolled back, tried out; whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.changed_model import changed_model
from tests.e2e.asking import PROMPTS, Asking, greedy
from tests.e2e.programs import run, wait_for
from tests.e2e.version_mesh import LONG, Mesh, running_mesh
from tests.grown_model import grown_model

pytestmark = pytest.mark.slow

EXPERTS = ((0, 1), (1, 0), (1, 3))
STEPS = ("promotion written down", "alias moved", "table published")


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("versions")
    learning = {
        "stream": str(folder / "stream"),
        "state": str(folder / "state"),
        "capture": {"without_key": True, "consent": "a test", "shard_age": "1s"},
        "bandit": {"fewest": 20},
    }
    with running_mesh(tiny_model, folder, versions={"spare_experts": 2}, learning=learning) as mesh:
        yield mesh


@pytest.fixture(autouse=True)
def at_base(mesh: Mesh, base: Any) -> None:
    """Whatever a test before left."""
    status = mesh.status()
    if status.candidate:
        mesh.rollback()
    if status.serving != base[0]:
        mesh.promote(base[0])


@pytest.fixture(scope="module")
def changed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return changed_model(tiny_model, tmp_path_factory.mktemp("changed"), EXPERTS)


@pytest.fixture(scope="module")
def base(mesh: Mesh) -> tuple[str, list[list[int]], tuple[str, list[int]]]:
    """The version that serves at first, its answers, and a long one."""
    return mesh.answer()[0], mesh.answers(), mesh.stream()


@pytest.fixture(scope="module")
def version(mesh: Mesh, changed: tuple[Path, Path], base: Any) -> str:
    """A staged version with three experts of its own."""
    digest = mesh.published(changed[1])
    staged = mesh.live("stage", digest[:12])
    assert staged["manifest"] == digest and sum(staged["bytes_by_host"].values()) > 0
    return digest


def test_a_version_is_promoted_under_load_and_rolled_back(mesh: Mesh, base: Any, version: str) -> None:
    digest, answers, long = base
    with Asking(mesh.client, answers) as asking:
        wait_for(lambda: asking.answers > 3, 60, "answers while the version is only loaded")
    assert asking.wrong == []

    found = mesh.while_streaming(lambda: mesh.promote(version))
    assert found == long, "a running answer ends with the version that it began with"
    named, answer = mesh.answer()
    assert named == version and answer.json()["system_fingerprint"] == f"expertmesh-{version[:16]}"
    others = mesh.answers()
    assert all(one != other for one, other in zip(others, answers, strict=True))
    listed = mesh.command("list")
    assert listed["aliases"] == {"production": version}

    back = mesh.live("rollback")
    assert (back["manifest"], back["before"]) == (digest, version) and mesh.answers() == answers
    assert mesh.live("promote", version, "--reason", "a test")["everywhere"]

    mesh.rollback()


def test_running_requests_go_on_with_the_new_version_where_that_is_chosen(
    mesh: Mesh, base: Any, version: str
) -> None:
    _, answers, long = base
    named, tokens = mesh.while_streaming(lambda: mesh.promote(version, goes_on=True))
    assert named == base[0] and len(tokens) == LONG and tokens != long[1]
    same = next(n for n, (a, b) in enumerate(zip(tokens, long[1], strict=True)) if a != b)
    assert same > 0, "it began with the version before"
    mesh.rollback()
    assert mesh.answers() == answers, "nothing that the other version computed is used"


@pytest.mark.parametrize("step", STEPS)
def test_a_controller_that_dies_in_a_promotion_leaves_one_version(
    mesh: Mesh, base: Any, version: str, step: str
) -> None:
    digest, answers, _ = base
    with Asking(mesh.client, answers) as asking:
        mesh.ask_controller("crash_at", step)
        # It fails, or is answered by the controller that takes its place.
        with contextlib.suppress(Exception):
            mesh.promote(version)
        wait_for(lambda: mesh.status().serving == version, 60, "the promotion to be finished")
        wait_for(lambda: mesh.answer()[0] == version, 60, "requests to get it")
    wrong = [said for said in asking.wrong if "[" not in said]
    assert wrong == [], "no request failed; tokens are of either version"
    assert mesh.command("list")["aliases"]["production"] == version
    mesh.rollback()
    wait_for(lambda: mesh.answer()[0] == digest, 60, "the version before")
    assert mesh.answers() == answers


def test_a_host_that_dies_comes_back_with_every_version(mesh: Mesh, base: Any, version: str) -> None:
    _, answers, _ = base
    mesh.promote(version)
    others = mesh.answers()
    reports = mesh.ask_controller("reports")
    held = {host_id: report.experts_loaded for host_id, report in reports.items()}
    os.kill(reports["local-0"].address.pid, signal.SIGKILL)

    def back() -> bool:
        found = mesh.ask_controller("reports").get("local-0")
        return getattr(found, "experts_loaded", 0) == held["local-0"] and (
            found.address.pid != reports["local-0"].address.pid
        )

    wait_for(back, 90, "the host to come back with as many experts")
    wait_for(lambda: httpx.get(f"{mesh.server.url}/ready").status_code == 200, 60, "the mesh to be ready")
    assert mesh.answers() == others
    mesh.rollback()
    assert mesh.answers() == answers


def test_a_version_with_another_router_waits_for_running_requests_and_answers_as_its_checkpoint(
    mesh: Mesh, base: Any, version: str, tmp_path: Path
) -> None:
    digest, answers, long = base
    # One expert more in every layer, so that routers are longer.
    folder, file = grown_model(mesh.model, tmp_path / "router", 1, seed=1)
    router = mesh.published(file, digest)
    mesh.stage(router)
    assert mesh.answers() == answers
    found = mesh.while_streaming(lambda: mesh.promote(router))
    assert found == long
    others = mesh.answers()
    assert mesh.answer()[0] == router and others != answers
    named, tokens = mesh.while_streaming(mesh.rollback)
    assert named == router and len(tokens) == LONG
    assert mesh.answers() == answers and mesh.answer()[0] == digest
    named, tokens = mesh.while_streaming(lambda: mesh.promote(router, goes_on=True))
    assert named == digest and len(tokens) == LONG and mesh.answers() == others
    assert "which one engine can't have twice" in mesh.live("promote", digest, "--canary", "5%", code=1)
    mesh.rollback()
    # The same weights from a folder, without any version, mesh or vLLM.
    assert greedy(folder, PROMPTS) == others


def test_a_version_without_an_expert_answers_as_one_whose_copy_took_its_place(
    mesh: Mesh, base: Any, version: str
) -> None:
    digest, answers, _ = base
    mesh.promote(version)
    others = mesh.answers()
    held = sum(report.experts_loaded for report in mesh.ask_controller("reports").values())
    moved = mesh.command("publish", "--clone", "0:1", "--retire", "0:1")["digest"]
    assert mesh.live("stage", moved)["bytes_by_host"] == {}, "a copy is the same bytes"
    wait_for(lambda: moved in mesh.status().live, 60, "a version to be loaded")
    mesh.promote(moved)
    assert mesh.answer()[0] == moved and mesh.answers() == others != answers
    # All experts of the base are alike, so that without those that were changed it is the base again.
    gone = [word for layer, expert in ((0, 8), (1, 0), (1, 3)) for word in ("--retire", f"{layer}:{expert}")]
    less = mesh.command("publish", *gone)["digest"]
    assert mesh.command("show", less)["retired"] == {"0": [1, 8], "1": [0, 3]}
    mesh.stage(less)
    mesh.promote(less)
    assert mesh.answer()[0] == less and mesh.answers() == answers
    assert sum(report.experts_loaded for report in mesh.ask_controller("reports").values()) == held
    more = mesh.command("publish", *["--clone", "0:1"] * 3, "--parent", digest)["digest"]
    assert "start it with versions.spare_experts: 3" in mesh.live("stage", more, code=1)
    mesh.promote(digest)


def test_users_of_a_version_on_trial_stay_on_their_side(mesh: Mesh, base: Any, version: str) -> None:
    digest, _, _ = base
    assert mesh.live("promote", version, "--canary", "50%")["candidate"] == version
    wait_for(lambda: {mesh.answer()[0] for _ in range(16)} == {digest, version}, 60, "both versions in use")
    sides = {user: mesh.answer(user=user)[0] for user in map(str, range(12))}
    assert set(sides.values()) == {digest, version}
    assert {user: mesh.answer(user=user)[0] for user in sides} == sides
    liked = mesh.answer(user="1")[1].json()["id"]
    feedback = f"{mesh.server.url}/expertmesh/feedback"
    assert httpx.post(feedback, json={"id": liked, "score": 1}).status_code == 204
    assert httpx.post(feedback, json={"id": "cmpl-none", "score": 1}).status_code == 404
    assert httpx.post(feedback, json={"id": liked, "score": 7}).status_code in (400, 422)
    wait_for(lambda: sum(mesh.status().seen) > 20, 60, "the controller to hear of answers")
    assert "on trial" in mesh.live("promote", version, "--canary", "5%", code=1)
    mesh.rollback()
    status = mesh.status()
    assert status.serving == digest and status.candidate == "" and "a test" in status.verdict
    assert {mesh.answer()[0] for _ in range(8)} == {digest}


def test_of_two_versions_the_one_that_users_like_comes_to_serve(
    mesh: Mesh, base: Any, version: str, tmp_path: Path
) -> None:
    def bandit(*words: str, code: int = 0) -> Any:
        words = ("bandit", *words, "--config", str(mesh.server.config), *(("--json",) if code == 0 else ()))
        done = run(tmp_path / f"bandit-{len(list(tmp_path.iterdir()))}", "learn", *words)
        assert done.process.returncode == code, done.out + done.err
        return json.loads(done.out) if code == 0 else done.err

    assert "no versions share requests" in bandit("--end", "--url", mesh.server.url, code=1)
    if version not in mesh.status().live:
        mesh.stage(version)
    begun = bandit("--arm", version[:12], "--url", mesh.server.url)
    assert begun["under_way"] and begun["arms"] == [base[0], version] and begun["report"] is None
    shares = mesh.status().shares["text/short"]
    assert shares.keys() == {base[0], version} and min(shares.values()) > 0.4
    assert "is on trial" in mesh.live("promote", version, "--canary", "5%", code=1)
    wait_for(lambda: mesh.answer()[0] == version, 60, "requests to be shared out")
    given: dict[str, str] = {}
    for number in range(120):
        named, answer = mesh.answer(prompt=f"what is the number after {number}?")
        given[answer.json()["id"]] = named
    assert 30 < sum(named == version for named in given.values()) < 90

    def told(name: str, named: str) -> bool:
        said = {"id": name, "score": float(named == version)}
        # A moment after the answer it is known.
        return httpx.post(f"{mesh.server.url}/expertmesh/feedback", json=said).status_code == 204

    for name, named in given.items():
        wait_for(lambda name=name, named=named: told(name, named), 30, "an answer to be remembered")  # type: ignore[misc]
    wait_for(lambda: bandit("--dry-run")["report"]["requests"] == 120, 60, "all of it to be in the stream")
    known = bandit("--dry-run")
    assert known["report"]["promote"] == version and mesh.status().serving == base[0], known
    pulls = {one["manifest"]: one["pulls"] for one in known["report"]["arms"]}
    assert pulls == Counter(given.values())
    found = bandit("--url", mesh.server.url)
    assert found["promoted"] == version and not found["under_way"]
    assert mesh.status().serving == version and mesh.status().shares == {}
    assert found["ended"].startswith("promoted: of 2 versions: it earns")
    mesh.rollback()


def test_a_version_goes_the_whole_way_over_the_admin_api(mesh: Mesh, base: Any, tmp_path: Path) -> None:
    digest, answers, _ = base
    _, file = changed_model(mesh.model, tmp_path / "uploaded", EXPERTS, seed=3)

    def ask(method: str, path: str, content: bytes | None = None) -> Any:
        return mesh.admin.request(method, path, content=content).raise_for_status().json()

    assert "administered at" in mesh.server.out + mesh.server.err
    assert httpx.get(str(mesh.admin.base_url.join("/live"))).status_code == 401
    assert ask("GET", "/live")["serving"] == digest
    made = ask("POST", f"/versions?reason=better&parent={digest}", content=file.read_bytes())
    uploaded = made["digest"]
    assert sum(map(len, made["changed"].values())) == made["new_blobs"] == len(EXPERTS)
    assert sum(ask("POST", f"/versions/{uploaded}/stage")["bytes_by_host"].values()) > 0
    wait_for(lambda: uploaded in ask("GET", "/live")["live"], 60.0, "the version")
    assert ask("POST", f"/versions/{uploaded}/promote")["everywhere"] is True
    assert mesh.answer()[0] == uploaded and mesh.answers() != answers
    assert ask("POST", "/rollback")["manifest"] == digest
    assert mesh.answers() == answers
    assert "hush" not in mesh.server.out + mesh.server.err


def test_what_makes_no_sense_is_refused_and_nothing_changes(
    mesh: Mesh, base: Any, version: str, tmp_path: Path
) -> None:
    digest, answers, _ = base
    assert "no version begins with" in mesh.live("stage", "beef", code=1)
    assert "serves already" in mesh.live("promote", digest, code=1)
    assert "neither finish nor continue" in mesh.live("promote", version, "--running", "now", code=2)
    _, file = changed_model(mesh.model, tmp_path / "other", EXPERTS[:1], seed=2)
    other = mesh.published(file, digest)
    assert "is not loaded" in mesh.live("promote", other, code=1)
    # A bit flips in one of its blobs on disk: hosts see it before they hold it.
    (blob,) = set(mesh.command("show", other)["layers"]["0"].values())
    path = mesh.store / "blobs" / blob[:2] / blob
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert "is damaged" in mesh.live("stage", other, code=1)
    assert other not in mesh.status().live and mesh.answers() == answers


def test_what_nobody_needs_is_let_go_and_collected(mesh: Mesh, base: Any, version: str) -> None:
    digest, answers, _ = base
    kept = mesh.command("gc", "--min-age", "0s", "--history", "1")
    assert version not in kept["manifests"], "it is loaded"
    held = sum(report.experts_loaded for report in mesh.ask_controller("reports").values())
    mesh.live("unstage", version)
    for name in mesh.status().live:
        if name not in (digest, version):
            mesh.ask_controller("unstage", name)
    wait_for(lambda: mesh.live("live")["live"] == [digest], 120, "the others to be let go")
    wait_for(
        lambda: sum(report.experts_loaded for report in mesh.ask_controller("reports").values()) < held,
        120,
        "hosts to drop what they held of it",
    )
    mesh.command("gc", "--min-age", "0s", "--history", "1")
    # The one that was on trial is still what the alias `candidate` points at.
    listed = mesh.command("list")
    assert {found["digest"] for found in listed["versions"]} == {digest, version}
    assert listed["aliases"] == {"production": digest, "candidate": version}
    needed = {
        blob for of_layer in mesh.command("show", version)["layers"].values() for blob in of_layer.values()
    }
    assert {path.name for path in (mesh.store / "blobs").rglob("*") if path.is_file()} == needed
    assert mesh.answers() == answers
