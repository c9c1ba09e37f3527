"""The controller's contract over Ray actors and Ray's key-value store, and the controller as an actor."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import ray
from safetensors.torch import load_file, save_file

from actors import ray_controller
from actors.ray_controller import KvStore
from actors.ray_hosts import RayHost, RayHosts, RayNodes
from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.controller import Controller, Deployment
from cluster.ray_cluster import nodes
from cluster.table import PlacementTable
from tests.controller_contract import TIMEOUT_S, ControllerContract
from tests.tiny_models import make_tiny
from tests.unit.actors.test_http_server import free_port
from workloads.deploy import blueprint
from workloads.version_store import first_version

# Loads nothing, so a host takes as long as its imports; what hosts compute is tested elsewhere.
CONFIG = Config.model_validate(
    {
        "hosts": [{"count": 2, "threads": 1, "kernel": "noop", "memory": "64MiB"}],
        "data_plane": {"tcp": "never"},
    }
)


class RayWorld:
    """Host actors and a document in one Ray namespace of its own."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._folder = folder
        self.namespace = f"contract-{secrets.token_hex(4)}"
        self.hosts = RayHosts(self.namespace)
        self._checkpoint = checkpoint
        self._store = KvStore(f"contract:{self.namespace}")
        self._frozen = 0

    def controller(self) -> Controller:
        return Controller(self.hosts, self._store, RayNodes())

    def deployment(self, name: str = "model") -> Deployment:
        return blueprint(CONFIG, self._checkpoint, "float32", name, nodes()).deployment

    def hanging(self) -> Deployment:
        """A model behind a pipe that nobody writes to: opening it never ends, as on a dead network disk."""
        os.mkfifo(self._folder / "config.json")
        deployment = self.deployment()
        first, *others = deployment.hosts
        return replace(deployment, hosts=(replace(first, model_path=str(self._folder)), *others))

    def kill(self, host_id: str) -> None:
        host = self.hosts.find(host_id)
        assert host is not None
        host.stop()
        deadline = time.monotonic() + TIMEOUT_S
        while self.hosts.find(host_id, host.generation) is not None:
            assert time.monotonic() < deadline, f"{host_id} does not die"
            time.sleep(0.05)

    def freeze(self, host_id: str) -> None:
        host = self.hosts.find(host_id)
        assert host is not None
        self._frozen = host.report(TIMEOUT_S).address.pid
        os.kill(self._frozen, signal.SIGSTOP)

    def thaw(self, host_id: str) -> None:
        os.kill(self._frozen, signal.SIGCONT)

    def let_pass(self, seconds: float) -> None:
        time.sleep(seconds)

    def living(self) -> set[str]:
        found = {host_id: self.hosts.find(host_id) for host_id in ("local-0", "local-1")}
        return {host_id for host_id, host in found.items() if host is not None and answers(host)}


def answers(host: RayHost) -> bool:
    try:
        host.progress(TIMEOUT_S)
    except ray.exceptions.RayActorError:
        return False
    return True


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny") / "mixtral"
    return Checkpoint.open(make_tiny("mixtral", folder))


@pytest.fixture
def world(ray_cluster: str, checkpoint: Checkpoint, tmp_path: Path) -> Iterator[RayWorld]:
    made = RayWorld(checkpoint, tmp_path)
    yield made
    made.controller().stop()


class TestControllerOverRay(ControllerContract):
    """The contract, over Ray."""


def test_the_controller_s_actor_is_restarted_and_knows_its_deployment(world: RayWorld) -> None:
    actor = ray_controller.get_or_start(world.namespace)
    try:
        ray.get(actor.deploy.remote(world.deployment()), timeout=TIMEOUT_S)
        table = ray.get(actor.publish.remote(TIMEOUT_S), timeout=2 * TIMEOUT_S)
        ray.kill(actor, no_restart=False)
        assert ray.get(actor.table.remote(), timeout=TIMEOUT_S) == table
        assert ray.get(actor.publish.remote(TIMEOUT_S), timeout=2 * TIMEOUT_S) == table
        assert ray_controller.published_table(world.namespace, TIMEOUT_S) == table
        assert len(PlacementTable.from_json(table).running) == 2
    finally:
        ray.get(actor.stop.remote(), timeout=TIMEOUT_S)
        ray.kill(actor, no_restart=True)
    assert world.living() == set()


def test_the_controller_s_actor_is_stopped_however_many_engines_wait(world: RayWorld) -> None:
    actor = ray_controller.get_or_start(world.namespace)
    try:
        ray.get(actor.deploy.remote(world.hanging()), timeout=TIMEOUT_S)
        waiting = [actor.publish.remote(10 * TIMEOUT_S) for _ in range(12)]
        assert ray.wait(waiting, timeout=1.0)[0] == []
        ray.get(actor.stop.remote(), timeout=TIMEOUT_S / 2)
        for publish in waiting:
            with pytest.raises(ray.exceptions.RayTaskError, match=r"ended while|nothing is deployed"):
                ray.get(publish, timeout=TIMEOUT_S)
    finally:
        ray.kill(actor, no_restart=True)
    assert world.living() == set()


def test_the_controller_s_actor_repairs_and_a_killed_one_goes_on_repairing(world: RayWorld) -> None:
    actor = ray_controller.get_or_start(world.namespace)
    try:
        ray.get(actor.deploy.remote(world.deployment()), timeout=TIMEOUT_S)
        first = PlacementTable.from_json(ray.get(actor.publish.remote(TIMEOUT_S), timeout=2 * TIMEOUT_S))
        lost = first.hosts["local-0"]
        assert lost is not None
        pid = ray.get(actor.pid.remote(), timeout=TIMEOUT_S)
        # As the kernel does when memory is short: host and controller at once.
        os.kill(lost.pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        table, epochs = first, [first.epoch]
        deadline = time.monotonic() + 2 * TIMEOUT_S
        while table.hosts["local-0"] in (None, lost):
            assert time.monotonic() < deadline, "the host was not launched again"
            text = ray.get(actor.next_table.remote(table.epoch, 5.0), timeout=TIMEOUT_S)
            if text:
                table = PlacementTable.from_json(text)
                epochs.append(table.epoch)
        assert epochs == sorted(set(epochs)) and table.epoch == first.epoch + 2
        new = table.hosts["local-0"]
        assert new is not None and new.unix == lost.unix and new.pid != lost.pid
        assert table.hosts["local-1"] == first.hosts["local-1"]
        assert ray.get(actor.pid.remote(), timeout=TIMEOUT_S) != pid
        state, other = ray.get(actor.states.remote(), timeout=TIMEOUT_S)
        assert (state.state, state.launches, state.crashes) == ("ready", 2, 1) and state.reason
        assert (other.launches, other.crashes, other.reason) == (1, 0, "")
    finally:
        ray.get(actor.stop.remote(), timeout=TIMEOUT_S)
        ray.kill(actor, no_restart=True)
    assert world.living() == set()


def test_the_controller_s_actor_serves_the_admin_api_until_it_is_stopped_also_after_it_was_killed(
    world: RayWorld, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = Config.model_validate(
        {
            "hosts": [{"count": 2, "threads": 1, "kernel": "noop", "memory": "64MiB"}],
            "data_plane": {"tcp": "never"},
            "versions": {"store": str(tmp_path / "store")},
            "admin": {"port": free_port(), "keys": ["hush"]},
        }
    )
    versions = first_version(config, checkpoint)
    deployment = blueprint(config, checkpoint, "float32", "model", nodes(), versions=versions).deployment
    actor = ray_controller.get_or_start(world.namespace)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{config.admin.port}",
        headers={"Authorization": "Bearer hush"},
        timeout=TIMEOUT_S,
        transport=httpx.HTTPTransport(retries=3),
    ) as client:
        try:
            ray.get(actor.deploy.remote(deployment), timeout=TIMEOUT_S)
            assert client.get("/live").json()["serving"] == versions.serving
            assert client.get("/live", headers={"Authorization": "Bearer other"}).status_code == 401
            os.kill(ray.get(actor.pid.remote(), timeout=TIMEOUT_S), signal.SIGKILL)
            ray.get(actor.publish.remote(TIMEOUT_S), timeout=2 * TIMEOUT_S)
            file = changed(checkpoint, tmp_path / "changed.safetensors")
            made = client.post("/versions", content=file.read_bytes()).json()
            assert made["changed"] == {"0": [1]}
            found = client.get("/versions").json()
            assert {version["digest"] for version in found["versions"]} == {
                versions.serving,
                made["digest"],
            }
            answer = client.post(f"/versions/{made['digest'][:12]}/stage")
            assert answer.status_code == 202 and answer.json()["manifest"] == made["digest"]
            ray.get(actor.stop.remote(), timeout=TIMEOUT_S)
            with pytest.raises(httpx.ConnectError):
                client.get("/health")
        finally:
            ray.get(actor.stop.remote(), timeout=TIMEOUT_S)
            ray.kill(actor, no_restart=True)
    assert world.living() == set()


def changed(checkpoint: Checkpoint, file: Path) -> Path:
    """A file with one expert of the first layer, changed."""
    weights = load_file(checkpoint.path / "model.safetensors")
    save_file(
        {
            name: value + 1
            for name, value in weights.items()
            if ".layers.0." in name and ".experts.1." in name
        },
        file,
    )
    return file


def test_stop_is_answered_while_many_engines_watch(world: RayWorld) -> None:
    actor = ray_controller.get_or_start(world.namespace)
    try:
        watching = [actor.next_table.remote(99, TIMEOUT_S) for _ in range(12)]
        assert ray.wait(watching, timeout=1.0)[0] == []
        ray.get(actor.stop.remote(), timeout=TIMEOUT_S / 2)
        assert ray.get(actor.reports.remote(), timeout=TIMEOUT_S / 2) == {}
    finally:
        ray.kill(actor, no_restart=True)
