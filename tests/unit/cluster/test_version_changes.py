"""Versions over hosts and a store in memory: staged, promoted, rolled back and let go, in any order, with crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from cluster import version_changes
from cluster.canary import Answered, Observed, Trial
from cluster.controller import Controller
from cluster.errors import StoreError, VersionError
from cluster.promotion import VersionSettings
from cluster.table import PlacementTable
from cluster.versions.aliases import Move
from cluster.versions.collect import collect
from cluster.versions.files import Files
from cluster.versions.manifest import Manifest
from tests.controller_contract import looked_until, published
from tests.unit.cluster.test_controller import MODEL, SILENCE_S
from tests.unit.cluster.version_world import BASE, KEEP_S, Crash, VersionWorld, live


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
    assert told.manifest == version and told.bytes_by_host == {"a-0": 512}, (
        "two, where it says that four take 1024"
    )
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


@pytest.mark.parametrize(
    ("room", "manifest", "words"),
    [
        (
            1,
            Manifest(MODEL, added={2: {6: 0, 7: 1}}),
            "has layers with 2 more experts .*with versions.spare_experts: 2",
        ),
        (0, Manifest(MODEL, retired={2: (0,)}), "retires experts.*with versions.spare_experts: 1"),
    ],
)
def test_other_numbers_of_experts_than_engines_have_room_for_are_refused(
    world: VersionWorld, room: int, manifest: Manifest, words: str
) -> None:
    controller = world.controller()
    settings = VersionSettings(keep_warm_s=KEEP_S, spare_experts=room)
    controller.deploy(replace(world.deployment(), version_settings=settings))
    published(controller)
    controller.look()
    digest = world.store.manifests.put(manifest)
    with pytest.raises(VersionError, match=f"(?s){words}"):
        controller.versions.stage(digest)
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


def test_a_version_with_a_router_of_its_own_is_tried_out_by_an_engine_of_its_own(
    world: VersionWorld, controller: Controller
) -> None:
    blob, _ = world.store.blobs.put(b"router")
    version = world.store.manifests.put(Manifest(MODEL, dense={"gate": blob}))
    controller.versions.stage(version)
    looked_until(world, controller, lambda: version in live(controller).live)

    def ask(*engines: str) -> None:
        for engine in engines:
            controller.next_table(PlacementTable.from_json(controller.table()).epoch, 0, engine)

    ask("one")
    with pytest.raises(VersionError, match=r"(?s)can't have twice.*engine.replicas: 2"):
        controller.trials.try_out(Trial(version, (0.05, 0.5), step_s=SILENCE_S / 2))
    assert world.store.aliases.current("candidate") is None
    ask("two")
    controller.trials.try_out(Trial(version, (0.05, 0.5), step_s=SILENCE_S / 2))
    assert (live(controller).engines, live(controller).pinned) == (("one", "two"), "two")
    ask("one", "two", "zero")
    controller.look()
    assert (live(controller).engines, live(controller).pinned) == (("one", "two", "zero"), "two")
    world.let_pass(SILENCE_S * 0.6)
    ask("one", "two", "zero")
    controller.trials.observe(Observed(version, *[(Answered(False, 0.1),)] * 2))
    controller.look()
    assert (live(controller).share, live(controller).pinned) == (0.5, "two"), "the same at the next share"

    # A controller that has just begun does not know yet who is there.
    after = world.controller()
    after.look()
    assert after.trials.under_way
    while after.trials.under_way:
        world.let_pass(SILENCE_S * 0.4)
        after.next_table(PlacementTable.from_json(after.table()).epoch, 0, "one")
        after.look()
        assert world.now < 100
    assert (live(after).candidate, live(after).pinned, live(after).engines) == ("", "", ())
    assert "the engine that computed it is gone" in after.versions.status().verdict
    after.close()


def test_a_version_that_is_being_staged_is_no_garbage(world: VersionWorld, controller: Controller) -> None:
    version = world.publish({0: "x"})
    before = world.store.manifests.modified(version)
    controller.versions.stage(version)
    after = world.store.manifests.modified(version)
    assert before is not None and after is not None and after > before
    collected = collect(world.store, history=1, min_age_s=0.0, now=after)
    assert version not in collected.manifests and not set(world.store.manifests.get(version).blobs) & {
        *collected.blobs
    }


def test_versions_share_requests_by_lot(world: VersionWorld, controller: Controller) -> None:
    version = staged(world, controller, {0: "x"})
    serving = live(controller).serving
    shares = {"": {serving: 0.25, version: 0.75}, "chat/short": {serving: 1.0, version: 0.0}}
    epoch = controller.trials.share_out(shares)
    assert live(controller).shares == shares == controller.versions.status().shares
    assert controller.trials.share_out(shares) == epoch, "nothing has changed"
    with pytest.raises(VersionError, match="bandit over 2 versions is on trial"):
        controller.trials.try_out(Trial(version, (0.05,)))
    with pytest.raises(VersionError, match="serves"):
        controller.versions.unstage(version)
    other = world.controller()
    assert live(other).shares == shares, "a controller that begins anew goes on with them"
    controller.trials.share_out({})
    assert live(controller).shares == {}
    controller.trials.share_out(shares)
    controller.versions.promote(version)
    assert live(controller).shares == {} and live(controller).serving == version


def test_what_can_not_share_requests_is_refused(world: VersionWorld, controller: Controller) -> None:
    serving = live(controller).serving
    with pytest.raises(VersionError, match="add up to 1"):
        controller.trials.share_out({"": {serving: 0.5}})
    with pytest.raises(VersionError, match="is not loaded"):
        controller.trials.share_out({"": {serving: 0.5, "f" * 64: 0.5}})
    blob, _ = world.store.blobs.put(b"router")
    router = world.store.manifests.put(Manifest(MODEL, dense={"gate": blob}))
    controller.versions.stage(router)
    looked_until(world, controller, lambda: router in live(controller).live)
    with pytest.raises(VersionError, match="which one engine can't have twice"):
        controller.trials.share_out({"": {serving: 0.5, router: 0.5}})
    version = staged(world, controller, {0: "x"})
    controller.trials.try_out(Trial(version, (0.05,)))
    with pytest.raises(VersionError, match="is on trial"):
        controller.trials.share_out({"": {serving: 0.5, version: 0.5}})
