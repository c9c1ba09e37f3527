"""Versions that share requests: what is under way outlives whoever looks after it, and ends in one way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config_learning import BanditConfig
from cluster.contexts import CONTEXTS
from cluster.errors import LearningError, VersionConflictError
from cluster.learning.records import Record
from cluster.learning.stream import Stream
from cluster.version_changes import VersionsStatus
from cluster.versions.files import Files
from workloads.learn_bandit import Bandit
from workloads.learn_bandit_commands import as_json, as_table, as_text


class Killed(BaseException):
    """As by SIGKILL."""


@dataclass
class FakeServer:
    serving: str = "old"
    live: set[str] = field(default_factory=lambda: {"old", "new"})
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    promoted: list[str] = field(default_factory=list)
    dies: bool = False

    def status(self) -> VersionsStatus:
        return VersionsStatus(self.serving, tuple(self.live), {}, shares=self.shares)

    def share_out(self, shares: Mapping[str, Mapping[str, float]]) -> None:
        if missing := {name for of in shares.values() for name in of} - self.live:
            raise VersionConflictError(f"version {min(missing)} is not loaded", "stage it first")
        self.shares = shares
        if self.dies:
            raise Killed

    def promote(self, manifest: str, reason: str) -> None:
        self.serving, self.shares = manifest, {}
        self.promoted.append(reason)
        if self.dies:
            raise Killed


@dataclass
class World:
    folder: Path
    now: float = 100.0
    server: FakeServer = field(default_factory=FakeServer)

    def __post_init__(self) -> None:
        self.stream = Stream(str(self.folder / "stream"))
        self.dice = np.random.default_rng(5)

    def bandit(self, **changes: Any) -> Bandit:
        config = BanditConfig(fewest=20, **changes)
        files = Files(str(self.folder / "state"))
        return Bandit(files, self.stream, config, self.server, clock=lambda: self.now)

    def requests(self, count: int, likes: Mapping[str, float]) -> None:
        """As routers would write them down, with the shares that the server has now."""
        records = []
        for number in range(count):
            context = CONTEXTS[self.dice.integers(len(CONTEXTS))]
            of = self.server.shares[context]
            arm = "new" if self.dice.random() < of["new"] else "old"
            name = f"{self.stream.last()}-{number}"
            records.append(
                Record(
                    "request", name, self.now, manifest=arm, context=context, propensity=of[arm], answer="x"
                )
            )
            score = float(self.dice.random() < likes[arm])
            records.append(Record("feedback", name, self.now, score=score))
        self.stream.append(records)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_earns_more_gets_more_and_is_promoted(world: World) -> None:
    world.bandit().begin(["new"])
    assert world.server.shares["chat/short"]["new"] == pytest.approx(0.5, abs=0.05)
    for _ in range(20):
        world.requests(60, {"old": 0.3, "new": 0.8})
        world.now += 61
        # Somebody else every time.
        assert (world.bandit().look() and not world.bandit().look()) or world.server.promoted
        if world.server.promoted:
            break
        assert world.server.shares["chat/short"]["new"] > 0.5
    state = world.bandit().state()
    assert (
        world.server.serving == "new" and state.promoted == "new" and state.ended.startswith("promoted: of 2")
    )
    assert not state.under_way and world.server.shares == {} and state.metrics["gain.new.low"] > 0
    report = world.bandit().report(state)
    assert report is not None and report.promote == "new"
    assert "shared requests: promoted" in as_text(state, report) and as_table(state, report).row_count == 2
    assert as_json(state, report)["report"]["arms"][1]["manifest"] == "new"
    with pytest.raises(LearningError, match="no versions share requests"):
        world.bandit().update()


def test_what_is_worse_gets_the_floor_and_may_be_ended(world: World) -> None:
    world.bandit().begin(["new"])
    world.requests(600, {"old": 0.8, "new": 0.2})
    state = world.bandit().update()
    for context in CONTEXTS:
        assert 0.1 - 1e-9 <= world.server.shares[context]["new"] < 0.2
    assert "does not earn more" in state.reasons["new"]
    assert world.bandit().end().ended == "by hand" and world.server.shares == {}


@pytest.mark.parametrize("likes", [0.9, 0.4])
def test_a_look_that_was_cut_short_is_done_again(world: World, likes: float) -> None:
    world.bandit().begin(["new"])
    world.requests(500, {"old": 0.4, "new": likes})
    world.server.dies = True
    with pytest.raises(Killed):
        world.bandit().update()
    world.server.dies = False
    state = world.bandit().update()
    if likes > 0.5:
        assert (
            state.promoted == "new" and state.ended == "new was promoted" and len(world.server.promoted) == 1
        )
    else:
        assert state.under_way and world.server.shares == state.shares


def test_a_server_that_began_anew_is_told_again_or_it_ends(world: World) -> None:
    world.bandit().begin(["new"])
    world.server.shares = {}
    assert world.bandit().update().under_way and world.server.shares != {}
    world.server.live = {"old"}
    state = world.bandit().update()
    assert state.ended == "version new is not loaded" and state.promoted == ""
    world.server.live = {"old", "new"}
    assert world.bandit().begin(["new"]).number == 2
    world.server.serving = "by hand"
    assert "another version serves by now" in world.bandit().update().ended


def test_what_passes_is_only_named_where_that_is_asked_for(world: World) -> None:
    world.bandit().begin(["new"])
    world.requests(500, {"old": 0.2, "new": 0.9})
    state = world.bandit(promote=False).update()
    assert state.under_way and world.server.promoted == []
    assert "new would be promoted" in as_text(state, world.bandit().report(state))


def test_mistakes_are_told(world: World) -> None:
    with pytest.raises(LearningError, match="no versions share requests"):
        world.bandit().end()
    with pytest.raises(LearningError, match="each once"):
        world.bandit().begin(["old"])
    with pytest.raises(VersionConflictError, match="is not loaded"):
        world.bandit().begin(["unheard"])
    assert (
        world.bandit().state().arms == ()
        and as_text(world.bandit().state(), None) == "no versions share requests"
    )
    world.bandit().begin(["new"])
    assert "nothing is known yet" in as_text(
        world.bandit().state(), world.bandit().report(world.bandit().state())
    )
    with pytest.raises(LearningError, match="share requests already"):
        world.bandit().begin(["new"])
    Files(str(world.folder / "state")).renew("bandit", b'{"form": 9}')
    with pytest.raises(LearningError, match="is of form 9"):
        world.bandit().state()
    Files(str(world.folder / "state")).renew("bandit", b"?")
    with pytest.raises(LearningError, match="makes no sense"):
        world.bandit().look()


def test_what_somebody_else_ended_meanwhile_stays_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.bandit().begin(["new"])
    world.requests(100, {"old": 0.4, "new": 0.4})
    mine = world.bandit()
    logs = mine.logs

    def meanwhile(state: Any) -> Any:
        world.bandit().end()
        return logs(state)

    monkeypatch.setattr(mine, "logs", meanwhile)
    assert mine.update().ended == "by hand" and world.server.shares == {}


def test_a_promotion_that_fails_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.bandit().begin(["new"])
    world.requests(500, {"old": 0.2, "new": 0.9})

    def refused(manifest: str, reason: str) -> None:
        raise VersionConflictError("another version is being promoted", "try again")

    with monkeypatch.context() as patched:
        patched.setattr(world.server, "promote", refused)
        assert world.bandit().update().under_way
    assert world.bandit().update().promoted == "new"
