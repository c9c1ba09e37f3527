"""Versions of a mesh, in any order of what operators do and of what may happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster import version_changes
from cluster.canary import Answered, Observed, Trial
from cluster.errors import ExpertmeshError
from cluster.live_versions import numbers
from cluster.reconcile import held_by_host
from cluster.versions.collect import collect
from tests.controller_contract import published
from tests.unit.cluster.version_world import BASE, KEEP_S, Crash, VersionWorld, live


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
        added=st.sampled_from([{}, {}, {6: 0}, {6: 2, 7: 2}]),
        retired=st.sampled_from([(), (), (0,), (2, 5)]),
    )
    def publish(
        self, experts: dict[int, str], parent: int, added: dict[int, int], retired: tuple[int, ...]
    ) -> None:
        parent_ = self.published[parent % len(self.published)]
        more = {expert: "xy"[expert % 2] for expert in added if expert == 7}
        self.published.append(self.world.publish({**experts, **more}, parent_, added, retired))

    @rule()
    def another_engine_asks(self) -> None:
        assert self.world.table is not None
        self.controller.next_table(self.world.table.epoch, 0, "other")

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
        for manifest, differs in table.versions.live.items():
            gone = table.versions.retired.get(manifest, {}).get(2, ())
            added = table.versions.added.get(manifest, {}).get(2, {})
            for expert in {*range(6), *added} - {*gone}:
                number = differs.get(2, {}).get(expert, expert)
                assert number in numbers(table.versions, {2: (added.get(expert, expert),)})[2]
        assert table.versions.pinned in ("", *table.versions.engines)

    def teardown(self) -> None:
        if hasattr(self, "controller"):
            self.controller.close()
        self.patch.undo()


TestVersions = Versions.TestCase
TestVersions.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
