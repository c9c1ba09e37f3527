"""Versions over hosts and a store in memory: staged, promoted, rolled back and let go, in any order, with crashes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster import version_changes
from cluster.canary import Answered, Observed, Trial
from cluster.controller import Controller
from cluster.deployment import Deployment
from cluster.errors import ExpertmeshError, StoreError, VersionError
from cluster.live_versions import LiveVersions, numbers
from cluster.messages import MoeLayer, StoreAddress
from cluster.promotion import VersionSettings
from cluster.reconcile import held_by_host
from cluster.table import PlacementTable
from cluster.versions.aliases import Move
from cluster.versions.collect import collect
from cluster.versions.files import Files
from cluster.versions.manifest import Manifest
from cluster.versions.store import Store
from tests.controller_contract import looked_until, published
from tests.unit.cluster.test_controller import EXPERTS, MODEL, SILENCE_S, MemoryWorld

KEEP_S = 100.0
BASE = Manifest(MODEL)


class Crash(BaseException):
    """The controller's process ends here."""


class VersionWorld(MemoryWorld):
    """With a store, and an engine that follows the table."""

    def __init__(self) -> None:
        super().__init__()
        self.address = StoreAddress(f"memory://{uuid.uuid4().hex}")
        self.store = Store(self.address.url)
        self.store.manifests.put(BASE)
        self.store.aliases.move("production", Move(1, BASE.digest, 0.0))
        self.table: PlacementTable | None = None
        self.running: set[str] = set()

    def controller(self) -> Controller:
        controller = super().controller()
        controller.versions._wall = controller.trials._wall = lambda: self.now
        return controller

    def deployment(self, name: str = "model") -> Deployment:
        planned = super().deployment(name)
        table = PlacementTable.from_json(planned.table)
        versions = LiveVersions(BASE.digest, {BASE.digest: {}})
        return replace(
            planned,
            hosts=tuple(replace(s, group=s.host_id[0], store=self.address) for s in planned.hosts),
            table=replace(table, versions=versions).to_json(),
            layers=tuple(MoeLayer(layer, 6, 100) for layer in EXPERTS),
            store=self.address,
            version_settings=VersionSettings(keep_warm_s=KEEP_S),
        )

    def publish(self, experts: dict[int, str], parent: str = "") -> str:
        """A version with these contents of experts of layer 2."""
        named = {expert: self.store.blobs.put(text.encode())[0] for expert, text in experts.items()}
        return self.store.manifests.put(Manifest(MODEL, {2: named} if named else {}, parent=parent))

    def follow(self, controller: Controller) -> None:
        """The engine takes the table, and says so."""
        epoch = self.table.epoch if self.table is not None else -1
        text = controller.next_table(epoch, 0, "engine", sorted(self.running))
        if text:
            self.table = PlacementTable.from_json(text)
            controller.next_table(self.table.epoch, 0, "engine", sorted(self.running))


def live(controller: Controller) -> LiveVersions:
    return PlacementTable.from_json(controller.table()).versions


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> VersionWorld:
    monkeypatch.setattr(version_changes, "_ENGINES_S", 0.05)
    return VersionWorld()


@pytest.fixture
def controller(world: VersionWorld) -> Iterator[Controller]:
    controller = world.controller()
    controller.deploy(world.deployment())
    published(controller)
    controller.look()
    yield controller
    controller.close()


def staged(world: VersionWorld, controller: Controller, experts: dict[int, str]) -> str:
    version = world.publish(experts)
    controller.versions.stage(version[:12])
    looked_until(world, controller, lambda: version in live(controller).live)
    return version


def test_a_version_is_loaded_beside_what_serves_then_serves_and_goes_back(
    world: VersionWorld, controller: Controller
) -> None:
    version = world.publish({0: "x", 3: "y"})
    told = controller.versions.stage(version[:12])
    assert told.manifest == version and told.bytes_by_host == {"a-0": 800}, "two experts of 100 float32"
    assert controller.versions.status().coming == (version,)
    looked_until(world, controller, lambda: version in live(controller).live)
    assert live(controller).serving == BASE.digest and world.held("a-0")[2] == (0, 3, 6, 7)

    done = controller.versions.promote(version, author="me", reason="better")
    assert (done.manifest, done.before) == (version, BASE.digest) and live(controller).serving == version
    moved = world.store.aliases.current("production")
    assert moved is not None and (moved.manifest, moved.author, moved.reason) == (version, "me", "better")
    with pytest.raises(VersionError, match="serves already"):
        controller.versions.promote(version)

    assert controller.versions.rollback().manifest == BASE.digest and live(controller).serving == BASE.digest
    assert controller.versions.rollback().manifest == version, "and forth again"


def test_a_version_that_served_is_let_go_after_a_while_when_no_request_is_its_own(
    world: VersionWorld, controller: Controller
) -> None:
    version = staged(world, controller, {0: "x"})
    world.follow(controller)
    world.running = {BASE.digest}
    controller.versions.promote(version)
    world.let_pass(KEEP_S + SILENCE_S + 1)
    world.follow(controller)
    for _ in range(3):
        controller.look()
    assert BASE.digest in live(controller).live, "one of its requests runs"
    world.running = set()
    world.follow(controller)
    looked_until(world, controller, lambda: BASE.digest not in live(controller).live)
    assert world.held("a-0")[2] == (0, 3, 6), "an engine may use the table before"
    world.follow(controller)
    looked_until(world, controller, lambda: world.held("a-0")[2] == (3, 6))
    with pytest.raises(VersionError, match="is not loaded"):
        controller.versions.rollback()


def test_a_version_can_be_let_go_by_hand(world: VersionWorld, controller: Controller) -> None:
    version = staged(world, controller, {0: "x"})
    world.let_pass(SILENCE_S + 1)
    with pytest.raises(VersionError, match="serves"):
        controller.versions.unstage("production")
    controller.versions.unstage(version)
    looked_until(world, controller, lambda: version not in live(controller).live)
    looked_until(world, controller, lambda: world.held("a-0")[2] == (0, 3))
    with pytest.raises(VersionError, match="is not loaded"):
        controller.versions.unstage(version)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda world, version: world.store.blobs.remove(next(iter(world.store.blobs.all()))),
            "lacks 1 of its",
        ),
        (lambda world, version: world.store.manifests.remove(version), "no version begins with"),
    ],
)
def test_what_can_not_be_loaded_is_refused(
    world: VersionWorld, controller: Controller, damage: Callable[[VersionWorld, str], int], words: str
) -> None:
    version = world.publish({0: "x"})
    damage(world, version)
    with pytest.raises(VersionError, match=words):
        controller.versions.stage(version)
    assert controller.versions.status().live == (BASE.digest,)


def test_a_version_of_another_model_or_with_experts_that_it_lacks_is_refused(
    world: VersionWorld, controller: Controller
) -> None:
    other = world.store.manifests.put(Manifest("cd" * 32))
    with pytest.raises(VersionError, match=r"is of model cdcdcd.*, this mesh runs abab"):
        controller.versions.stage(other)
    with pytest.raises(VersionError, match="which the model does not have"):
        controller.versions.stage(world.publish({6: "x"}))


def test_a_store_that_is_out_of_reach_leaves_a_promotion_that_is_finished_later(
    world: VersionWorld, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = staged(world, controller, {0: "x"})
    create = Files.create

    def answer_is_lost(files: Files, name: str, data: bytes) -> bool:
        create(files, name, data)
        raise StoreError("the store does not answer", "try again")

    monkeypatch.setattr(Files, "create", answer_is_lost)
    with pytest.raises(StoreError):
        controller.versions.promote(version)
    assert live(controller).serving == BASE.digest and controller.versions.status().promoting == version
    monkeypatch.undo()
    looked_until(world, controller, lambda: live(controller).serving == version)
    assert controller.versions.status().promoting == ""
    moves = world.store.aliases.history("production")
    assert [move.manifest for move in moves] == [BASE.digest, version]


def test_where_signatures_are_wanted_an_unsigned_version_is_refused(world: VersionWorld) -> None:
    controller = world.controller()
    wanted = VersionSettings(keep_warm_s=KEEP_S, public_key="/etc/versions.pub")
    controller.deploy(replace(world.deployment(), version_settings=wanted))
    published(controller)
    controller.look()
    with pytest.raises(VersionError, match="is not signed"):
        controller.versions.stage(world.publish({0: "x"}))
    assert controller.versions.status().live == (BASE.digest,)
    controller.close()


def test_a_version_without_room_is_refused_with_the_numbers(
    world: VersionWorld, controller: Controller
) -> None:
    # A host says that it holds 1024 bytes.
    world.nodes = tuple(replace(node, memory_bytes=4500) for node in world.nodes)
    world.let_pass(1.0)
    controller.look()
    with pytest.raises(
        VersionError, match=r"a-0 holds 0.0 MB of weights and has room for 0.0 MB: .*do not fit"
    ):
        controller.versions.stage(world.publish({0: "x", 3: "y"}))
    assert controller.versions.status().coming == ()


def test_a_host_that_can_not_load_it_leaves_everything_as_it_was(
    world: VersionWorld, controller: Controller
) -> None:
    host = world.find("a-0")
    assert host is not None
    host.fails_to_adopt = True
    controller.versions.stage(world.publish({0: "x"}))
    looked_until(world, controller, lambda: "could not load" in controller.changes.abandoned)
    assert controller.versions.status().live == (BASE.digest,) and controller.versions.status().coming == ()


def test_what_is_promoted_while_another_version_loads_goes_on_serving(
    world: VersionWorld, controller: Controller
) -> None:
    version, other = staged(world, controller, {0: "x"}), world.publish({0: "y"})
    host = world.find("a-0")
    assert host is not None
    host.adopts = False
    controller.versions.stage(other)
    controller.versions.promote(version, continue_running=True)
    controller.look()
    host.adopts = True
    controller.versions.stage(version)  # that it is asked again
    looked_until(world, controller, lambda: other in live(controller).live)
    assert live(controller).serving == version and live(controller).continued == {BASE.digest: version}


def test_an_alias_that_somebody_else_moves_ends_the_promotion(
    world: VersionWorld, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = staged(world, controller, {0: "x"})

    def elsewhere(step: str) -> None:
        if step == "promotion written down":
            world.store.aliases.move("production", Move(2, BASE.digest, 1.0, "somebody else"))

    monkeypatch.setattr(version_changes, "crash_here", elsewhere)
    with pytest.raises(VersionError, match="moved by somebody else"):
        controller.versions.promote(version)
    assert live(controller).serving == BASE.digest and controller.versions.status().promoting == ""


@pytest.mark.parametrize("step", ["promotion written down", "alias moved", "table published"])
def test_a_controller_that_dies_in_a_promotion_leaves_one_that_finishes_it(
    world: VersionWorld, controller: Controller, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    version = staged(world, controller, {0: "x"})

    def die(at: str) -> None:
        if at == step:
            raise Crash

    monkeypatch.setattr(version_changes, "crash_here", die)
    with pytest.raises(Crash):
        controller.versions.promote(version)
    monkeypatch.undo()
    after = world.controller()
    looked_until(world, after, lambda: live(after).serving == version)
    current = world.store.aliases.current("production")
    assert current is not None and current.manifest == version and current.number == 2
    assert after.versions.status().promoting == ""


def test_a_version_on_trial_that_fails_goes_and_one_that_does_not_serves(
    world: VersionWorld, controller: Controller
) -> None:
    version = staged(world, controller, {0: "x"})
    good, bad = (Answered(False, 0.1),) * 50, (Answered(True, 0.1),) * 50
    for seen, end in ((bad, "rolled back"), (good, "promoted")):
        controller.trials.try_out(Trial(version[:8], (0.05,)))
        alias = world.store.aliases.current("candidate")
        assert alias is not None and alias.manifest == version
        assert (live(controller).candidate, live(controller).share) == (version, 0.05)
        with pytest.raises(VersionError, match="is on trial"):
            controller.trials.try_out(Trial(version, (0.05,)))
        with pytest.raises(VersionError, match="serves"):
            controller.versions.unstage(version)
        for _ in range(6):
            controller.trials.observe(Observed(version, good, seen))
        controller.look()
        assert live(controller).candidate == "" and not controller.trials.under_way
        assert f"{version[:12]} {end}: " in controller.versions.status().verdict
    assert live(controller).serving == version
    with pytest.raises(VersionError, match="no version is on trial"):
        controller.trials.end("by hand")


class Versions(RuleBasedStateMachine):
    """Any order of what operators do and what may happen: one version serves, and engines find what they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(version_changes, "_ENGINES_S", 0.0)
        self.crash_at = ""
        self.patch.setattr(version_changes, "crash_here", self.crash_here)
        self.world = VersionWorld()
        self.published = [BASE.digest]
        self.promoted = [BASE.digest]

    def crash_here(self, step: str) -> None:
        if step == self.crash_at:
            raise Crash

    @initialize()
    def deploy(self) -> None:
        self.controller = self.world.controller()
        self.controller.deploy(self.world.deployment())
        published(self.controller)
        self.look()
        self.world.follow(self.controller)

    @rule(
        experts=st.dictionaries(st.integers(0, 5), st.sampled_from("xyz"), max_size=2),
        parent=st.integers(0, 9),
    )
    def publish(self, experts: dict[int, str], parent: int) -> None:
        version = self.world.publish(experts, self.published[parent % len(self.published)])
        self.published.append(version)

    @rule(which=st.integers(0, 9))
    def stage(self, which: int) -> None:
        self.attempt(lambda: self.controller.versions.stage(self.published[which % len(self.published)]))

    @rule(which=st.integers(0, 9))
    def unstage(self, which: int) -> None:
        self.attempt(lambda: self.controller.versions.unstage(self.published[which % len(self.published)]))

    @rule(which=st.integers(0, 9), goes_on=st.booleans())
    def promote(self, which: int, goes_on: bool) -> None:
        version = self.published[which % len(self.published)]
        self.attempt(lambda: self.controller.versions.promote(version, continue_running=goes_on))

    @rule()
    def rollback(self) -> None:
        self.attempt(self.controller.versions.rollback)

    @rule(which=st.integers(0, 9), shares=st.sampled_from([(0.05,), (0.05, 0.5), (0.5, 0.1)]))
    def try_out(self, which: int, shares: tuple[float, ...]) -> None:
        trial = Trial(self.published[which % len(self.published)], shares, step_s=1.0, give_up_s=KEEP_S)
        self.attempt(lambda: self.controller.trials.try_out(trial))

    @rule(history=st.integers(1, 3))
    def collect(self, history: int) -> None:
        status = self.controller.versions.status()
        running = {*status.live, *status.coming, status.promoting or status.serving}
        found = collect(self.world.store, running, history=history, min_age_s=0.0, now=1e12)
        assert not running.intersection(found.manifests)

    @rule(failed=st.booleans())
    def candidate_answers(self, failed: bool) -> None:
        assert self.world.table is not None
        seen = (Answered(failed, 0.1),) * 40
        self.controller.trials.observe(
            Observed(self.world.table.versions.candidate, (Answered(False, 0.1),) * 40, seen)
        )

    @rule()
    def end_trial(self) -> None:
        self.attempt(lambda: self.controller.trials.end("by hand"))

    @rule(
        which=st.integers(0, 9),
        step=st.sampled_from(["promotion written down", "alias moved", "table published"]),
    )
    def promote_and_crash(self, which: int, step: str) -> None:
        self.crash_at = step
        try:
            self.promote(which, False)
        except Crash:
            self.crash_at = ""
            self.crash()
        self.crash_at = ""

    @rule()
    def crash(self) -> None:
        self.controller.close()
        self.controller = self.world.controller()

    @rule()
    def look(self) -> None:
        self.controller.look()

    @rule()
    def requests_come_and_the_engine_follows(self) -> None:
        assert self.world.table is not None
        versions = self.world.table.versions
        self.world.running |= {versions.serving, versions.candidate or versions.serving}
        self.world.follow(self.controller)

    @rule()
    def requests_end(self) -> None:
        self.world.running.clear()

    @rule(seconds=st.sampled_from([0.5, 2.0, KEEP_S + 1]))
    def time_passes(self, seconds: float) -> None:
        # An engine that lives asks all the time.
        self.world.follow(self.controller)
        self.world.let_pass(seconds)
        self.world.follow(self.controller)

    def attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except ExpertmeshError as error:
            assert error.message and error.hint

    @invariant()
    def one_version_serves(self) -> None:
        versions, status = live(self.controller), self.controller.versions.status()
        assert versions.serving in versions.live
        assert not versions.candidate or versions.candidate in versions.live
        assert (versions.candidate, versions.share) == (status.candidate, status.share)
        assert bool(versions.candidate) == self.controller.trials.under_way
        current = self.world.store.aliases.current("production")
        assert current is not None
        if not status.promoting:
            assert current.manifest == versions.serving

    @invariant()
    def the_store_has_what_is_live(self) -> None:
        store = self.world.store
        for version in live(self.controller).live:
            assert store.missing(store.manifests.get(version)) == ()

    @invariant()
    def hosts_have_what_the_engine_may_ask_for(self) -> None:
        table = self.world.table
        assert table is not None
        wanted = held_by_host(table.experts, table.versions)
        for host_id, held in wanted.items():
            for layer, of_layer in held.items():
                assert set(of_layer) <= set(self.world.held(host_id)[layer])
        for manifest in self.world.running:
            goes_on_as = table.versions.continued.get(manifest, manifest)
            assert goes_on_as in table.versions.live
        assert numbers(table.versions, {2: (0,)})[2]

    def teardown(self) -> None:
        if hasattr(self, "controller"):
            self.controller.close()
        self.patch.undo()


TestVersions = Versions.TestCase
TestVersions.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
