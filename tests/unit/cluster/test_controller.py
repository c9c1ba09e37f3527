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

from cluster.config import HostGroup
from cluster.controller import Controller, Deployment
from cluster.errors import HostError
from cluster.holdings import Holdings, digest
from cluster.live_versions import Variants
from cluster.messages import (
    HostAddress,
    HostCost,
    HostHolds,
    HostProgress,
    HostReport,
    HostSpec,
    NodeInfo,
    Sources,
)
from cluster.ports import Host
from cluster.repair_state import HostDead, HostFailed, HostReady
from cluster.table import PlacementTable
from tests.controller_contract import TIMEOUT_S, ChangeContract, ControllerContract, moved, published, serving

MODEL = "ab" * 32
HANGS = "/where/reading/hangs"
BROKEN = "/where/weights/are/broken"
SILENCE_S = 1.0
NODE = NodeInfo("node", "10.0.0.1", "one", 8, 0, 2**30)
EXPERTS = {2: (0, 1), 3: (0, 1)}


class MemoryHost:
    """A host that is ready at once, until it is killed; or never, if its model can't be read."""

    def __init__(self, spec: HostSpec, generation: int, pid: int) -> None:
        self.spec = spec
        self.generation = generation
        self.answers = True
        self.alive = True
        self.address = HostAddress(spec.host_id, spec.node_id, spec.unix, "", pid)
        self.held = dict(spec.experts)
        self.adopts, self.fails_to_adopt = True, False
        self.failed = 0

    def progress(self, timeout_s: float) -> HostProgress:
        self._check()
        ready = self.spec.model_path not in (HANGS, BROKEN)
        error = "the model is broken" if self.spec.model_path == BROKEN else ""
        return HostProgress(self.spec.host_id, len(EXPERTS) if ready else 0, len(EXPERTS), ready, error)

    def probe(self, timeout_s: float) -> HostReady | HostFailed | HostDead | None:
        if not self.answers:
            return None
        host_id, path = self.spec.host_id, self.spec.model_path
        if not self.alive:
            return HostDead(host_id, self.generation, f"the actor of {host_id} is dead")
        if path == BROKEN:
            return HostFailed(host_id, self.generation, "the model is broken")
        holds = HostHolds(
            digest(self.held), 1024, failed=self.failed, error="no such file" if self.failed else ""
        )
        if path == HANGS:
            return None
        return HostReady(host_id, self.generation, self.address, 1024, holds, HostCost(1e-5, 1e-4, 1e-5))

    def adopt(self, experts: Holdings, number: int, bandwidth: int, variants: Variants) -> None:
        if self.fails_to_adopt:
            self.failed = number
        elif self.adopts:
            self.held, self.failed = dict(experts), 0

    def report(self, timeout_s: float) -> HostReport:
        self._check()
        return HostReport(self.address, 4, 1024, 2048, 0.1, "module", 0, 0, 0, 0.0)

    def stop(self) -> None:
        self.alive = False

    def _check(self) -> None:
        if not self.alive:
            raise HostError(f"the actor of {self.spec.host_id} is dead")


class MemoryNodes:
    def __init__(self, world: MemoryWorld) -> None:
        self._world = world

    def living(self) -> tuple[NodeInfo, ...]:
        return self._world.nodes


class MemoryWorld:
    """Hosts, Store and World in one. `before_launch` may raise in a launch's place."""

    def __init__(self) -> None:
        self.started: list[MemoryHost] = []
        self.document: bytes | None = None
        self.before_launch: Callable[[HostSpec], None] = lambda _spec: None
        self.after_launch: Callable[[], None] = lambda: None
        self.away = False
        """Whether nobody can say what runs."""
        self.nodes: tuple[NodeInfo, ...] = (NODE,)
        self.now = 0.0
        self._pids = count(100)

    def launch(self, spec: HostSpec, generation: int) -> Host:
        self.before_launch(spec)
        assert self.find(spec.host_id) is None, "two hosts of one name"
        self.started.append(MemoryHost(spec, generation, next(self._pids)))
        self.after_launch()
        return self.started[-1]

    def find(self, host_id: str, generation: int | None = None) -> MemoryHost | None:
        if self.away:
            raise TimeoutError("no answer")
        return next(
            (
                host
                for host in self.started
                if host.alive and host.spec.host_id == host_id and generation in (None, host.generation)
            ),
            None,
        )

    def load(self) -> bytes | None:
        return self.document

    def save(self, document: bytes) -> None:
        self.document = document

    def controller(self) -> Controller:
        return Controller(self, self, MemoryNodes(self), clock=lambda: self.now, silence_s=SILENCE_S)

    def kill(self, host_id: str) -> None:
        host = self.find(host_id)
        assert host is not None
        host.alive = False

    def freeze(self, host_id: str) -> None:
        host = self.find(host_id)
        assert host is not None
        host.answers = False

    def thaw(self, host_id: str) -> None:
        host = self.find(host_id)
        assert host is not None
        host.answers = True

    def let_pass(self, seconds: float) -> None:
        self.now += seconds

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
                {layer: (number, number + 3) for layer in EXPERTS},
                f"x-{host_id}",
                "",
                0,
            )
            for number, host_id in enumerate(ids)
        )
        rows = tuple((ids[expert % 3],) for expert in range(6))
        table = PlacementTable(MODEL, 0, dict.fromkeys(ids), dict.fromkeys(EXPERTS, rows))
        return Deployment(name, specs, table.to_json(), groups=(HostGroup(name="a"), HostGroup(name="b")))

    def held(self, host_id: str) -> dict[int, tuple[int, ...]]:
        host = self.find(host_id)
        assert host is not None
        return host.held

    def spec(self, host_id: str) -> HostSpec:
        return replace(self.deployment().hosts[0], host_id=host_id, unix=f"x-{host_id}", group="b")

    def broken(self) -> Deployment:
        """The same, but its first host can't load."""
        deployment = self.deployment()
        first, *others = deployment.hosts
        return replace(deployment, hosts=(replace(first, model_path=BROKEN), *others))

    def hanging(self) -> Deployment:
        deployment = self.deployment()
        first, *others = deployment.hosts
        return replace(deployment, hosts=(replace(first, model_path=HANGS), *others))


@pytest.fixture
def world() -> MemoryWorld:
    return MemoryWorld()


class TestController(ControllerContract, ChangeContract):
    """The contract, in memory."""


def test_a_host_that_cannot_load_its_experts_ends_the_change(world: MemoryWorld) -> None:
    controller, table = serving(world)
    giver, taker = list(table.hosts)[:2]
    host = world.find(taker)
    assert host is not None
    host.fails_to_adopt = True
    controller.changes.follow(moved(table, giver, taker), "a test")
    for _ in range(4):
        controller.look()
    assert controller.changes.abandoned == f"host {taker} could not load its experts: no such file"
    assert PlacementTable.from_json(controller.table()) == table
    deployment = controller.deployment()
    assert deployment is not None and deployment.following is None
    host.fails_to_adopt = False
    # What it said of the last change is not taken for this one's.
    controller.changes.follow(moved(table, giver, taker), "again")
    for _ in range(4):
        controller.look()
    assert PlacementTable.from_json(controller.table()).epoch == table.epoch + 1


def test_a_change_that_needs_a_host_which_is_not_ready_is_given_up(world: MemoryWorld) -> None:
    controller, table = serving(world)
    giver, taker = list(table.hosts)[:2]
    for _ in range(2):
        world.kill(taker)
        controller.look()
        controller.look()
    controller.changes.follow(moved(table, giver, taker), "a test")
    controller.look()
    assert controller.changes.abandoned.startswith(f"host {taker} is not ready")
    assert PlacementTable.from_json(controller.table()).experts == table.experts


def test_a_change_does_not_wait_for_a_host_that_stands_still(world: MemoryWorld) -> None:
    controller, table = serving(world)
    giver, taker = list(table.hosts)[:2]
    world.freeze(taker)
    host = world.find(taker)
    assert host is not None
    host.adopts = False
    controller.changes.follow(moved(table, giver, taker), "a test")
    controller.look()
    assert controller.changes.abandoned == ""
    world.let_pass(60)
    controller.look()
    assert controller.changes.abandoned == f"host {taker} is not ready, or does not answer"
    assert PlacementTable.from_json(controller.table()).experts == table.experts
    world.thaw(taker)
    host.adopts = True
    controller.look()
    controller.changes.follow(moved(table, giver, taker), "again")
    for _ in range(4):
        controller.look()
    assert PlacementTable.from_json(controller.table()).experts != table.experts


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


def test_what_keeps_a_host_from_starting_at_first_reaches_the_caller(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.broken())
    assert [state.error for state in controller.progress()] == ["the model is broken", "", ""]
    with pytest.raises(HostError, match=r"a-0 could not start: the model is broken"):
        controller.publish(TIMEOUT_S)
    # It stays as it is: whoever started the deployment ends it.
    controller.look()
    assert [state.error for state in controller.progress()] == ["the model is broken", "", ""]
    assert PlacementTable.from_json(controller.table()).epoch == 0
    assert len(world.started) == 3


def test_a_host_that_dies_before_all_were_ready_is_not_launched_again(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.hanging())
    world.kill("a-1")
    controller.look()
    assert "is dead" in controller.progress()[1].error
    with pytest.raises(HostError, match=r"a-1 could not start: .*is dead"):
        controller.publish(TIMEOUT_S)
    assert len(world.started) == 3


def test_a_relaunch_that_fails_is_a_crash(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())
    published(controller)

    def refuse(spec: HostSpec) -> None:
        raise RuntimeError("Ray is away")

    world.before_launch = refuse
    world.kill("a-1")
    controller.look()
    state = controller.states()[1]
    assert (state.state, state.crashes, state.reason) == ("backing off", 2, "not launched: Ray is away")
    world.before_launch = lambda _spec: None
    world.let_pass(1)
    assert published(controller).hosts["a-1"] is not None
    assert controller.states()[1].state == "ready"


def test_a_relaunch_whose_answer_was_lost_is_found(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())
    published(controller)

    def lose_the_answer() -> None:
        world.away = True
        raise TimeoutError("no answer")

    world.after_launch = lose_the_answer
    world.kill("a-1")
    for _ in range(3):
        controller.look()
        assert (controller.states()[1].state, len(world.started)) == ("starting", 4)
    world.away = False
    controller.look()
    assert (controller.states()[1].state, controller.states()[1].crashes) == ("ready", 1)
    assert len(world.started) == 4


def test_a_host_whose_node_is_gone_is_placed_on_another(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())
    before = published(controller)
    world.nodes = (replace(NODE, node_id="other", ip="10.0.0.2", memory_bytes=2 * 1024),)
    for host_id in tuple(world.living()):
        world.kill(host_id)
    world.let_pass(0.1)
    controller.look()
    # 1.25 KiB each, and 2 KiB there.
    assert [state.state for state in controller.states()] == [
        "ready",
        "waiting for room",
        "waiting for room",
    ]
    assert world.started[-1].spec.node_id == "other"
    assert world.started[-1].spec.tcp_ip == "10.0.0.2"
    assert "no living node that fits has the 1.2 KiB" in controller.states()[1].reason
    world.nodes += (NODE,)
    world.let_pass(0.1)
    controller.look()
    controller.look()
    assert {state.node_id for state in controller.states()} == {"other", "node"}
    after = published(controller)
    assert len(after.running) == 3 and after.epoch > before.epoch


def test_a_host_without_the_folder_is_told_who_is_ready_and_who_may_be_soon(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.hanging())
    # Nobody is known to be ready before the first look.
    assert controller.sources("b-0") == Sources((), ("a-0", "a-1"))
    controller.look()
    addresses = {host.spec.host_id: host.address for host in world.started}
    # Not itself; and a host that asks as well is no source to come.
    assert controller.sources("a-0") == Sources((addresses["a-1"], addresses["b-0"]), ())
    assert controller.sources("a-1") == Sources((addresses["b-0"],), ())
    assert controller.sources("unheard") == Sources((addresses["a-1"], addresses["b-0"]), ())
    controller.stop()
    assert controller.sources("a-0") == Sources((), ())


def test_a_host_that_is_launched_again_may_be_a_source_though_it_lacked_the_folder(
    world: MemoryWorld,
) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())
    published(controller)
    controller.sources("a-0")
    world.kill("a-0")
    controller.look()
    table = PlacementTable.from_json(controller.table())
    assert table.hosts["a-0"] is None
    asked = controller.sources("a-1")
    assert (asked.loading, [address.host_id for address in asked.ready]) == (("a-0",), ["b-0"])


def test_supervision_repairs_by_itself_until_closed(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.supervise(0.01)
    controller.deploy(world.deployment())
    table = published(controller)
    world.kill("b-0")
    table = PlacementTable.from_json(controller.next_table(table.epoch, TIMEOUT_S))
    table = PlacementTable.from_json(controller.next_table(2, TIMEOUT_S))
    assert (table.epoch, len(table.running)) == (3, 3)
    controller.close()


def test_nodes_that_cannot_be_seen_change_nothing(world: MemoryWorld) -> None:
    controller = world.controller()
    controller.deploy(world.deployment())
    table = published(controller)
    world.nodes = ()
    controller.look()
    assert published(controller) == table


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
            assert self.world.living() >= living
            return
        self.controller.deploy(self.world.deployment())
        self.deployed, self.epoch = True, 0

    @precondition(lambda self: self.world.living())
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.world.kill(data.draw(st.sampled_from(sorted(self.world.living()))))

    @rule(seconds=st.sampled_from([0.1, 2.0, 100.0]))
    def look(self, seconds: float) -> None:
        self.world.let_pass(seconds)
        self.controller.look()

    @rule()
    def restart(self) -> None:
        before = self.controller.deployment()
        launches = len(self.world.started)
        living = self.world.living()
        self.controller = self.world.controller()
        after = self.controller.deployment()
        assert (after is None) == (before is None)
        assert living <= self.world.living()
        # Only those that are dead are started again.
        assert len(self.world.started) - launches <= 3 - len(living)

    @precondition(lambda self: self.deployed)
    @rule()
    def publish(self) -> None:
        if len(self.world.living()) < 3 and not self.epoch:
            with pytest.raises(HostError):
                self.controller.publish(0.1)
            return
        for _ in range(8):
            self.world.let_pass(100)
            self.controller.look()
        table = published(self.controller)
        assert set(table.running) == {host.address for host in self.world.started if host.alive}

    @rule()
    def stop(self) -> None:
        self.controller.stop()
        self.deployed = False
        assert self.world.living() == set()

    @invariant()
    def the_epoch_never_goes_back(self) -> None:
        if self.deployed:
            assert len(self.world.living()) == sum(host.alive for host in self.world.started)
            epoch = PlacementTable.from_json(self.controller.table()).epoch
            assert epoch >= self.epoch
            self.epoch = epoch
        else:
            assert self.controller.deployment() is None


ControllerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestControllerMachine = ControllerMachine.TestCase
