"""The controller over hosts and a store in memory, in any order of calls and crashes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.controller import Controller, Deployment, Host
from cluster.errors import HostError
from cluster.messages import HostAddress, HostProgress, HostReport, HostSpec
from cluster.table import PlacementTable
from tests.controller_contract import TIMEOUT_S, ControllerContract, published

MODEL = "ab" * 32
HANGS = "/where/reading/hangs"
EXPERTS = {2: (0, 1), 3: (0, 1)}


class MemoryHost:
    """A host that is ready at once, until it is killed; or never, if its model can't be read."""

    def __init__(self, spec: HostSpec, pid: int) -> None:
        self.spec = spec
        self.alive = True
        self.ended = threading.Event()
        self.address = HostAddress(spec.host_id, spec.node_id, spec.unix, "", pid)

    def progress(self, timeout_s: float) -> HostProgress:
        self._check()
        return HostProgress(self.spec.host_id, len(EXPERTS), len(EXPERTS), True, "")

    def wait_ready(self, timeout_s: float) -> HostAddress:
        self._check()
        if self.spec.model_path == HANGS:
            if not self.ended.wait(timeout_s):
                raise TimeoutError
            self._check()
        return self.address

    def report(self, timeout_s: float) -> HostReport:
        self._check()
        return HostReport(self.address, 4, 1024, 2048, 0.1, "module", 0, 0, 0, 0.0)

    def stop(self) -> None:
        self.alive = False
        self.ended.set()

    def _check(self) -> None:
        if not self.alive:
            raise HostError(f"the actor of {self.spec.host_id} is dead")


class MemoryWorld:
    """Hosts, Store and World in one. `before_launch` may raise in a launch's place."""

    def __init__(self) -> None:
        self.started: list[MemoryHost] = []
        self.document: bytes | None = None
        self.before_launch: Callable[[HostSpec], None] = lambda _spec: None
        self._pids = count(100)

    def launch(self, spec: HostSpec) -> Host:
        self.before_launch(spec)
        assert self.find(spec.host_id) is None, "two hosts of one name"
        self.started.append(MemoryHost(spec, next(self._pids)))
        return self.started[-1]

    def find(self, host_id: str) -> Host | None:
        return next((h for h in self.started if h.alive and h.spec.host_id == host_id), None)

    def load(self) -> bytes | None:
        return self.document

    def save(self, document: bytes) -> None:
        self.document = document

    def controller(self) -> Controller:
        return Controller(self, self)

    def kill(self, host_id: str) -> None:
        host = self.find(host_id)
        assert isinstance(host, MemoryHost)
        host.alive = False

    def living(self) -> set[str]:
        return {host.spec.host_id for host in self.started if host.alive}

    def deployment(self, name: str = "model") -> Deployment:
        ids = ("a-0", "a-1", "b-0")
        specs = tuple(
            HostSpec(
                host_id,
                "node",
                "/m",
                MODEL,
                MODEL,
                "float32",
                "cpu",
                "auto",
                1,
                EXPERTS,
                f"x-{host_id}",
                "",
                0,
            )
            for host_id in ids
        )
        rows = tuple((ids[expert % 3],) for expert in range(6))
        table = PlacementTable(MODEL, 0, dict.fromkeys(ids), dict.fromkeys(EXPERTS, rows))
        return Deployment(name, specs, table.to_json())

    def hanging(self) -> Deployment:
        deployment = self.deployment()
        first, *others = deployment.hosts
        return replace(deployment, hosts=(replace(first, model_path=HANGS), *others))


@pytest.fixture
def world() -> MemoryWorld:
    return MemoryWorld()


class TestController(ControllerContract):
    """The contract, in memory."""


def test_a_launch_that_fails_leaves_no_host_behind(world: MemoryWorld) -> None:
    def refuse(spec: HostSpec) -> None:
        if spec.host_id == "b-0":
            raise RuntimeError("no such node")

    world.before_launch = refuse
    controller = world.controller()
    with pytest.raises(RuntimeError, match="no such node"):
        controller.deploy(world.deployment())
    assert world.living() == {"a-0", "a-1"}
    world.before_launch = lambda _spec: None
    # Asked again, it starts those that are missing.
    controller.deploy(world.deployment())
    assert world.living() == {"a-0", "a-1", "b-0"}
    controller.stop()
    assert world.living() == set()


def test_a_controller_that_dies_while_it_deploys_is_taken_up_by_the_next(world: MemoryWorld) -> None:
    def die(spec: HostSpec) -> None:
        if spec.host_id == "a-1":
            raise KeyboardInterrupt

    world.before_launch = die
    with pytest.raises(KeyboardInterrupt):
        world.controller().deploy(world.deployment())
    world.before_launch = lambda _spec: None
    controller = world.controller()
    assert world.living() == {"a-0", "a-1", "b-0"}
    assert len(world.started) == 3
    assert len(published(controller).running) == 3


def test_a_host_that_cannot_be_ended_does_not_keep_the_others(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())

    def fail() -> None:
        raise RuntimeError("unreachable")

    monkeypatch.setattr(world.find("a-0"), "stop", fail)
    controller.stop()
    assert world.living() == {"a-0"}
    assert controller.deployment() is None


def test_a_publish_is_told_of_the_stop_and_not_of_the_first_host_s_death(
    world: MemoryWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = world.controller()
    controller.deploy(world.hanging())
    monkeypatch.setattr(world.find("a-1"), "stop", lambda: time.sleep(0.3))
    stopping = threading.Timer(0.1, controller.stop)
    stopping.start()
    with pytest.raises(HostError, match="ended while"):
        controller.publish(TIMEOUT_S)
    stopping.join()


def test_what_a_host_failed_with_reaches_the_caller_and_the_table_stays(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())
    before = published(controller)
    world.kill("a-1")
    with pytest.raises(HostError, match="a-1 is dead"):
        controller.publish(TIMEOUT_S)
    assert PlacementTable.from_json(controller.table()) == before


class ControllerMachine(RuleBasedStateMachine):
    """Any order of deployments, deaths, restarts and publishing."""

    def __init__(self) -> None:
        super().__init__()
        self.world = MemoryWorld()
        self.controller = self.world.controller()
        self.deployed = False
        self.epoch = 0

    @rule()
    def deploy(self) -> None:
        if self.deployed:
            with pytest.raises(HostError):
                self.controller.deploy(self.world.deployment("another"))
            living = self.world.living()
            self.controller.deploy(self.world.deployment())
            assert self.world.living() == living
            return
        self.controller.deploy(self.world.deployment())
        self.deployed, self.epoch = True, 0

    @precondition(lambda self: self.world.living())
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.world.kill(data.draw(st.sampled_from(sorted(self.world.living()))))

    @rule()
    def restart(self) -> None:
        before = self.controller.deployment()
        self.controller = self.world.controller()
        assert self.controller.deployment() == before
        assert len(self.world.living()) == (3 if self.deployed else 0)

    @precondition(lambda self: self.deployed)
    @rule()
    def publish(self) -> None:
        if len(self.world.living()) < 3:
            with pytest.raises(HostError):
                self.controller.publish(TIMEOUT_S)
            return
        running = {host.address for host in self.world.started if host.alive}
        known = set(PlacementTable.from_json(self.controller.table()).running)
        table = published(self.controller)
        assert set(table.running) == running
        assert table.epoch == self.epoch + (known != running)

    @rule()
    def stop(self) -> None:
        self.controller.stop()
        self.deployed = False
        assert self.world.living() == set()

    @invariant()
    def the_epoch_never_goes_back(self) -> None:
        if self.deployed:
            epoch = PlacementTable.from_json(self.controller.table()).epoch
            assert epoch >= self.epoch
            self.epoch = epoch
        else:
            assert self.controller.deployment() is None


ControllerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestControllerMachine = ControllerMachine.TestCase
