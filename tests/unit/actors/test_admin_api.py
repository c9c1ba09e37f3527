"""The admin API over hosts and a store in memory, and over a real socket."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
from starlette.testclient import TestClient

from actors import admin_api, admin_server
from actors.admin_api import admin_app
from actors.admin_server import AdminServer
from actors.api_access import key_digest
from cluster import version_changes
from cluster.canary import Answered, Observed
from cluster.checkpoint import Checkpoint
from cluster.controller import Controller
from cluster.deployment import Deployment
from cluster.errors import ConfigError, StoreError
from cluster.messages import AdminSettings
from cluster.table import PlacementTable
from cluster.versions.aliases import Move
from cluster.versions.publish import publish_base
from tests.controller_contract import looked_until, published
from tests.unit.actors.test_http_server import free_port
from tests.unit.cluster.version_world import BASE, VersionWorld, live
from tests.unit.cluster.versions import tiny

SETTINGS = AdminSettings("127.0.0.1", 1, "/absent/model")
KEYED = replace(SETTINGS, key_digests=(key_digest("one"), key_digest("two")))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> VersionWorld:
    monkeypatch.setattr(version_changes, "_ENGINES_S", 0.05)
    return VersionWorld()


def deployed(world: VersionWorld) -> Controller:
    controller = world.controller()
    controller.deploy(world.deployment())
    published(controller)
    controller.look()
    return controller


@pytest.fixture
def controller(world: VersionWorld) -> Iterator[Controller]:
    controller = deployed(world)
    yield controller
    controller.close()


def asking(controller: Controller, settings: AdminSettings = SETTINGS) -> TestClient:
    return TestClient(admin_app(controller, settings), "http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def client(controller: Controller) -> TestClient:
    return asking(controller)


def ok(answer: httpx.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()


def refused(answer: httpx.Response, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"} and answer.json()["error"].keys() == {"message", "hint"}
    assert words in answer.json()["error"]["message"]


def staged(world: VersionWorld, controller: Controller, client: TestClient, text: str = "x") -> str:
    version = world.publish({0: text})
    found = ok(client.post(f"/versions/{version[:10]}/stage"), 202)
    assert found == {"manifest": version, "bytes_by_host": {"a-0": 256}}, (
        "one, where it says that four take 1024"
    )
    assert ok(client.get("/live"))["coming"] == [version]
    looked_until(world, controller, lambda: version in live(controller).live)
    return version


def test_a_version_is_staged_promoted_and_rolled_back(
    world: VersionWorld, controller: Controller, client: TestClient
) -> None:
    version = staged(world, controller, client)
    body = {"running": "continue", "author": "me", "reason": "better"}
    done = ok(client.post(f"/versions/{version}/promote", json=body))
    assert (done["manifest"], done["before"]) == (version, BASE.digest)
    moved = world.store.aliases.current("production")
    assert moved is not None and (moved.author, moved.reason) == ("me", "better")
    assert live(controller).continued == {BASE.digest: version}
    found = ok(client.get("/versions"))
    assert found["live"]["serving"] == version and found["aliases"] == {"production": version}
    assert {entry["digest"] for entry in found["versions"]} == {version, BASE.digest}
    assert ok(client.get("/versions/production"))["layers"].keys() == {"2"}
    assert ok(client.get("/versions/production/diff"))["against"] == ""
    other = ok(client.get(f"/versions/production/diff?other={BASE.digest}"))
    assert (other["against"], other["layers"]) == (BASE.digest, {"2": [0]})

    assert ok(client.post("/rollback"))["manifest"] == BASE.digest
    assert ok(client.post("/rollback", json={"reason": "after all"}))["manifest"] == version
    ok(client.post(f"/versions/{BASE.digest}/unstage"))
    world.let_pass(10.0)
    looked_until(world, controller, lambda: BASE.digest not in live(controller).live)


def test_a_version_is_tried_out_on_a_share_and_the_trial_ended(
    world: VersionWorld, controller: Controller, client: TestClient
) -> None:
    version = staged(world, controller, client)
    canary = {"shares": [0.05, 0.5], "every": "1m", "alpha": 0.02}
    found = ok(client.post(f"/versions/{version}/promote", json={"canary": canary}))
    assert (found["candidate"], found["share"], found["serving"]) == (version, 0.05, BASE.digest)
    trial = controller.deployment().canary.trial  # type: ignore[union-attr]
    assert (trial.shares, trial.step_s, trial.alpha) == ((0.05, 0.5), 60.0, 0.02)
    refused(client.post(f"/versions/{version}/unstage"), 409, "serves")
    controller.trials.observe(Observed(version, (Answered(False, 0.1),), (Answered(False, 0.1),)))
    assert ok(client.get("/live"))["seen"] == [1, 1]
    assert ok(client.post("/rollback"))["before"] == version
    assert ok(client.get("/live"))["verdict"].endswith("rolled back: by hand")


def test_a_host_that_can_not_load_a_version_is_told_of(
    world: VersionWorld, controller: Controller, client: TestClient
) -> None:
    host = world.find("a-0")
    assert host is not None
    host.fails_to_adopt = True
    ok(client.post(f"/versions/{world.publish({0: 'x'})}/stage"), 202)
    looked_until(world, controller, lambda: bool(controller.changes.abandoned))
    assert "could not load" in ok(client.get("/live"))["not_loaded"]


def test_what_can_not_be_is_refused_with_a_status_that_fits(
    world: VersionWorld, controller: Controller, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = world.publish({0: "x"})
    for method, path in (
        ("GET", "/versions/{}"),
        ("GET", "/versions/{}/diff"),
        ("GET", "/versions/production/diff?other={}"),
        ("POST", "/versions/{}/stage"),
        ("POST", "/versions/{}/promote"),
        ("POST", "/versions/{}/unstage"),
    ):
        refused(client.request(method, path.format("nosuch")), 404, "no version begins with 'nosuch'")
    refused(client.get("/nosuch"), 404, "Not Found: /nosuch")
    refused(client.get("/rollback"), 405, "Method Not Allowed")

    refused(client.post(f"/versions/{version}/promote"), 409, "is not loaded")
    refused(client.post(f"/versions/{version}/unstage"), 409, "is not loaded")
    refused(client.post(f"/versions/{BASE.digest}/promote"), 409, "serves already")
    refused(client.post("/rollback"), 409, "has been at one version only")
    ok(client.post(f"/versions/{version}/stage"), 202)
    refused(client.post(f"/versions/{world.publish({1: 'y'})}/stage"), 409, "is being changed already")

    refused(client.post(f"/versions/{world.publish({6: 'x'})}/stage"), 422, "which the model does not have")
    for body, words in (
        ({"running": "keep"}, "body.running: Input should be 'finish' or 'continue'"),
        ({"canary": {"shares": []}}, "body.canary.shares"),
        ({"canary": {"shares": [5]}}, "body.canary.shares.0"),
        ({"canary": {"shares": [0.1], "every": "soon"}}, "should be a duration"),
        ({"canary": {"shares": [0.1]}, "running": "finish"}, "running is nothing for a canary"),
        ({"runing": "finish"}, "body.runing: Extra inputs"),
    ):
        refused(client.post(f"/versions/{version}/promote", json=body), 422, words)
    refused(client.post("/gc", json={"history": 0}), 422, "body.history")
    looked_until(world, controller, lambda: version in live(controller).live)
    shares = {"canary": {"shares": [0.5, 0.1]}}
    refused(client.post(f"/versions/{version}/promote", json=shares), 422, "do not ascend")

    def away() -> None:
        raise StoreError("the store is out of reach")

    monkeypatch.setattr(controller.versions, "store", away)
    refused(client.get("/versions"), 503, "out of reach")
    monkeypatch.setattr(controller.versions, "store", lambda: 1 / 0)
    refused(client.get("/versions"), 500, "ZeroDivisionError")
    controller.stop()
    refused(client.get("/live"), 409, "nothing is deployed")


def test_garbage_is_collected_but_not_what_is_loaded(
    world: VersionWorld, controller: Controller, client: TestClient
) -> None:
    loaded, loose = staged(world, controller, client), world.publish({1: "loose"})
    young = ok(client.post("/gc"))
    assert young["manifests"] == [] and young["kept_manifests"] == 3
    for dry, left in ((True, 3), (False, 2)):
        found = ok(client.post("/gc", json={"dry_run": dry, "min_age": "0s", "history": 1}))
        assert found["manifests"] == [loose] and len(found["blobs"]) == 1
        assert len(world.store.manifests.all()) == left
    assert loaded in world.store.manifests.all()


def test_without_a_key_nothing_is_told_or_done(controller: Controller) -> None:
    client = asking(controller, KEYED)
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
        for method, path in (("GET", "/live"), ("POST", "/versions"), ("POST", "/rollback"), ("GET", "/no")):
            answer = client.request(method, path, headers=headers)
            refused(answer, 401, "wants one of admin.keys")
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        headers = {"Authorization": f"Bearer {key}", "Host": "mesh.example", "Origin": "https://other"}
        assert ok(client.get("/live", headers=headers))["serving"] == BASE.digest
    assert ok(client.get("/health")) == {"status": "ok"}


def test_without_keys_pages_of_other_sites_are_refused(client: TestClient) -> None:
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "[::1"},
    ):
        refused(client.post("/rollback", headers=headers), 403, "no other site's pages")
    for host in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        ok(client.get("/live", headers={"Host": host, "Origin": f"http://{host}"}))


@pytest.mark.parametrize("settings", [SETTINGS, KEYED], ids=["open", "keyed"])
def test_the_documentation_names_every_path(controller: Controller, settings: AdminSettings) -> None:
    client = asking(controller, settings)
    assert client.get("/docs").status_code == 200
    schema = ok(client.get("/openapi.json"))
    assert schema["paths"].keys() >= {
        "/versions",
        "/versions/{version}",
        "/versions/{version}/diff",
        "/versions/{version}/stage",
        "/versions/{version}/promote",
        "/versions/{version}/unstage",
        "/rollback",
        "/gc",
        "/live",
        "/health",
    }
    assert "application/octet-stream" in schema["paths"]["/versions"]["post"]["requestBody"]["content"]
    assert ("securitySchemes" in schema["components"]) == bool(settings.key_digests)


class PublishingWorld(VersionWorld):
    """Its model is a checkpoint on disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        digest = publish_base(self.store, checkpoint)
        self.store.aliases.move("production", Move(2, digest, 0.0))

    def deployment(self, name: str = "model") -> Deployment:
        planned = super().deployment(name)
        table = PlacementTable.from_json(planned.table)
        return replace(planned, table=replace(table, manifest=self.checkpoint.digest).to_json())


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[tuple[PublishingWorld, TestClient]]:
    world = PublishingWorld(tiny.base(tmp_path))
    controller = deployed(world)
    yield world, asking(controller, replace(SETTINGS, model_path=str(world.checkpoint.path)))
    controller.close()


def test_a_file_is_published_as_it_arrives(
    publishing: tuple[PublishingWorld, TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, client = publishing
    monkeypatch.setattr(admin_api, "_PIECE_BYTES", 100)
    file = tiny.changes(world.checkpoint, tmp_path / "a.safetensors", [(0, 1)])
    said = {"author": "me", "reason": "r", "metrics": json.dumps({"loss": 1.5})}

    def pieces() -> Iterator[bytes]:
        data = file.read_bytes()
        yield from (data[start : start + 77] for start in range(0, len(data), 77))

    made = ok(client.post("/versions", content=pieces(), params=said), 201)
    assert made["changed"] == {"0": [1]} and made["new_blobs"] == 1
    found = ok(client.get(f"/versions/{made['digest']}"))
    assert (found["author"], found["reason"], found["metrics"]) == ("me", "r", {"loss": 1.5})
    base = world.store.aliases.current("production")
    assert base is not None and found["parent"] == base.manifest

    other = tiny.changes(world.checkpoint, tmp_path / "b.safetensors", [(1, 2)])
    child = ok(
        client.post("/versions", content=other.read_bytes(), params={"parent": made["digest"][:9]}), 201
    )
    assert ok(client.get(f"/versions/{child['digest']}"))["parent"] == made["digest"]
    moved = ok(client.post("/versions", params={"clone": ["1:2", "1:3"], "retire": "1:2"}), 201)
    found = ok(client.get(f"/versions/{moved['digest']}"))
    assert (found["added"], found["retired"]) == ({"1": {"4": 2, "5": 3}}, {"1": [2]})


@pytest.mark.parametrize(
    ("content", "query", "status", "words"),
    [
        (b"", {}, 422, "the file is 0 bytes long: no safetensors header"),
        (b"\xff" * 100, {}, 422, "the file: the header should be"),
        ("torn", {}, 422, "its header says"),
        ("other", {}, 422, "model.layers.9.gate.weight"),
        ("good", {"parent": "nosuch"}, 404, "no version begins with 'nosuch'"),
        ("good", {"metrics": "{"}, 422, "metrics { are no JSON object of numbers"),
        ("good", {"metrics": '{"loss": NaN}'}, 422, "no JSON object of numbers"),
        ("base", {}, 422, "nothing to publish: all that the file holds"),
        (b"", {"clone": "1"}, 422, "'1' names no expert"),
        ("good", {"retire": "0:9"}, 422, "layer 0 has no expert 9"),
    ],
)
def test_a_file_that_is_no_version_leaves_nothing(
    publishing: tuple[PublishingWorld, TestClient],
    tmp_path: Path,
    content: bytes | str,
    query: dict[str, str],
    status: int,
    words: str,
) -> None:
    world, client = publishing
    made: dict[str, Callable[[], bytes]] = {
        "good": lambda: tiny.changes(world.checkpoint, tmp_path / "g.safetensors", [(0, 1)]).read_bytes(),
        "torn": lambda: made["good"]()[:-3],
        "base": lambda: tiny.changes(
            world.checkpoint, tmp_path / "g.safetensors", [(0, 1)], 0.0
        ).read_bytes(),
        "other": lambda: tiny.changes(
            world.checkpoint,
            tmp_path / "o.safetensors",
            [],
            model__layers__9__gate__weight=tiny.tensors()[tiny.GATE],
        ).read_bytes(),
    }
    before = world.store.blobs.all(), world.store.manifests.all()
    data = content if isinstance(content, bytes) else made[content]()
    refused(client.post("/versions", content=data, params=query), status, words)
    assert (world.store.blobs.all(), world.store.manifests.all()) == before


def test_a_full_disk_and_another_checkpoint_are_told_of(
    publishing: tuple[PublishingWorld, TestClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, client = publishing
    data = tiny.changes(world.checkpoint, tmp_path / "a.safetensors", [(0, 1)]).read_bytes()

    class Full:
        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        real = admin_api.tempfile.TemporaryFile
        patch.setattr(admin_api.tempfile, "TemporaryFile", lambda: Full(real()))
        refused(client.post("/versions", content=data), 503, "No space left on device")
    tiny.save(world.checkpoint.path, tiny.tensors(seed=1))
    refused(client.post("/versions", content=data), 422, "is not the model that is served any more")


def test_it_answers_on_a_port_of_its_own_and_gives_it_back(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_server, "_RETRY_S", 0.02)
    settings = replace(SETTINGS, port=free_port())
    app = admin_app(controller, settings)
    url = f"http://127.0.0.1:{settings.port}/health"
    server = AdminServer(app, settings)
    try:
        assert httpx.get(url).status_code == 200
        with pytest.raises(ConfigError, match=rf"admin\.port {settings.port} on 127\.0\.0\.1 can't be used"):
            AdminServer(app, settings)
        second = AdminServer(app, settings, patient=True)
        second.close()
    finally:
        server.close()
    with socket.create_server(("127.0.0.1", settings.port)) as other:
        patient = AdminServer(app, settings, patient=True)
        other.close()
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as asked:
            assert asked.get(url).status_code == 200
    finally:
        patient.close()
