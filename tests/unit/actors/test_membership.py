"""Which hosts are asked: strikes, frozen hosts, hysteresis; and when an answer is late."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from actors.latency import Latency
from actors.membership import FROZEN_S, Membership, State

NAMES = ("a", "b", "c")


@pytest.fixture
def members() -> Membership:
    made = Membership()
    made.keep(NAMES)
    for name in NAMES:
        made.let_in(name, 0.0)
    return made


def test_members_are_out_until_they_are_let_in() -> None:
    made = Membership()
    made.keep(["a"])
    assert made.state("a") is State.OUT
    made.let_in("a", 0.0)
    assert made.state("a") is State.ASKED


def test_a_late_member_is_suspected_until_it_has_answered(members: Membership) -> None:
    before = members.version
    members.late("a", 1.0)
    assert members.state("a") is State.SUSPECTED
    assert members.version > before
    members.caught_up("a")
    assert members.state("a") is State.ASKED


def test_three_late_answers_close_together_put_it_out(members: Membership) -> None:
    for second in (1.0, 1.1, 1.2):
        assert members.state("a") is State.ASKED
        members.late("a", second)
        members.caught_up("a")
    assert members.state("a") is State.OUT
    assert "late" in members.reason("a")


def test_late_answers_far_apart_do_not(members: Membership) -> None:
    for second in range(0, 60, 2):
        members.late("a", float(second))
        members.caught_up("a")
        assert members.state("a") is State.ASKED


def test_one_that_owes_its_answer_for_too_long_is_out(members: Membership) -> None:
    members.late("a", 1.0)
    assert not members.overdue("a", 1.0 + FROZEN_S / 2)
    assert members.overdue("a", 1.0 + FROZEN_S)
    assert members.state("a") is State.OUT
    assert not members.overdue("b", 100.0)


def test_late_again_soon_after_it_was_let_back_needs_more_good_probes(members: Membership) -> None:
    now, streaks = 100.0, []
    for _ in range(6):
        for _ in range(3):
            members.late("a", now)
            members.caught_up("a")
        streaks.append(members.streak("a"))
        now += 5
        members.let_in("a", now)
    assert streaks == [3, 6, 12, 24, 48, 48]
    now += 100
    for _ in range(3):
        members.late("a", now)
        members.caught_up("a")
    assert members.streak("a") == 3


def test_members_of_a_new_table_keep_their_state(members: Membership) -> None:
    members.lost("b", "gone")
    members.keep(["b", "c", "d"])
    assert [members.state(name) for name in ("b", "c", "d")] == [State.OUT, State.ASKED, State.OUT]


class Machine(RuleBasedStateMachine):
    """Any order of events: the version tells every change, and only a probe lets a member back."""

    def __init__(self) -> None:
        super().__init__()
        self.members, self.now = Membership(), 0.0
        self.members.keep(NAMES)
        self.seen: tuple[int, list[State]] = (self.members.version, self._states())

    def _states(self) -> list[State]:
        return [self.members.state(name) for name in NAMES]

    @rule(name=st.sampled_from(NAMES), seconds=st.floats(0, 2))
    def late(self, name: str, seconds: float) -> None:
        self.now += seconds
        if self.members.state(name) is not State.OUT:
            self.members.late(name, self.now)
            assert self.members.state(name) is not State.ASKED

    @rule(name=st.sampled_from(NAMES))
    def caught_up(self, name: str) -> None:
        out = self.members.state(name) is State.OUT
        self.members.caught_up(name)
        assert (self.members.state(name) is State.OUT) == out

    @rule(name=st.sampled_from(NAMES), seconds=st.floats(0, 1))
    def overdue(self, name: str, seconds: float) -> None:
        self.now += seconds
        if self.members.overdue(name, self.now):
            assert self.members.state(name) is State.OUT

    @rule(name=st.sampled_from(NAMES))
    def lost(self, name: str) -> None:
        self.members.lost(name, "gone")
        assert self.members.state(name) is State.OUT

    @rule(name=st.sampled_from(NAMES))
    def let_in(self, name: str) -> None:
        self.members.let_in(name, self.now)
        assert self.members.state(name) is State.ASKED

    @invariant()
    def every_change_is_told(self) -> None:
        version, states = self.seen
        assert self.members.version > version or self._states() == states
        self.seen = self.members.version, self._states()
        named = [name for state in State for name in self.members.named(state)]
        assert sorted(named) == sorted(NAMES)


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis_settings(max_examples=100, deadline=None)


def test_the_deadline_follows_what_is_usual() -> None:
    latency = Latency(floor_s=0.001, cap_s=30.0)
    assert latency.deadline(8) == 30.0
    for _ in range(100):
        latency.observe(8, 0.010, 0.0)
    assert 0.029 < latency.deadline(8) < 0.035
    for _ in range(50):
        latency.observe(8, 0.020, 0.0)
    assert 0.055 < latency.deadline(8) < 0.100


@given(st.floats(0.0, 1.0), st.integers(0, 100))
def test_a_host_that_becomes_ten_times_slower_stays_late(spread: float, seed: int) -> None:
    """However much its answers vary, and though those that come in time raise its mean."""
    dice, latency, now = random.Random(seed), Latency(floor_s=0.001, cap_s=30.0), 0.0

    def answer(times: float) -> float:
        return times * 0.002 * dice.uniform(1 - spread / 2, 1 + spread)

    for _ in range(600):
        now += 0.003
        latency.observe(8, answer(1), now)
    late = 0
    for _ in range(100):
        now += 0.020
        seconds = answer(10)
        late += seconds > latency.deadline(8)
        latency.observe(8, seconds, now)
    # Two thirds of the answers in two seconds, where three within one are enough.
    assert late > 60


def test_what_a_host_could_do_is_forgotten() -> None:
    latency = Latency(floor_s=0.001, cap_s=30.0)
    for second in range(100):
        latency.observe(8, 0.002, second / 100)
    for second in range(40):
        latency.observe(8, 0.020, 1.0 + second)
    assert latency.deadline(8) > 0.050


def test_sizes_never_seen_are_judged_by_their_neighbours() -> None:
    latency = Latency(floor_s=0.001, cap_s=30.0)
    for _ in range(50):
        latency.observe(4, 0.002, 0.0)
    assert latency.deadline(4) < latency.deadline(64) <= 30.0
    assert latency.deadline(2048) > latency.deadline(64)
    assert latency.deadline(1) == latency.deadline(4)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-6, 100)), max_size=40), st.integers(1, 4096))
def test_a_deadline_lies_between_its_limits(seen: list[tuple[int, float]], rows: int) -> None:
    latency = Latency(floor_s=0.01, cap_s=5.0)
    for count, seconds in seen:
        latency.observe(count, seconds, 0.0)
    assert 0.01 <= latency.deadline(rows) <= 5.0
