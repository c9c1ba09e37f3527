from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscale import AutoscaleState, Decision, GroupLoad, step
from cluster.config_autoscale import AutoscaleConfig

SETTINGS = AutoscaleConfig.model_validate(
    {"min": 1, "max": 10, "utilisation": 0.5, "queue": 0.5, "up_cooldown": 30, "down_cooldown": 100}
)
CALM = GroupLoad(0.5, 0, 4, 0.5, 4, 4)


def first(load: GroupLoad, now: float = 1000.0, settings: AutoscaleConfig = SETTINGS) -> Decision:
    """The decision for a group that has been as it is for longer than any pause."""
    return step(settings, AutoscaleState(load.hosts_wanted, 0.0), load, now)


@pytest.mark.parametrize(
    ("load", "target", "reason"),
    [
        (CALM, 4, "utilisation is 50%, to be 50%"),
        (replace(CALM, utilisation=0.55), 4, "utilisation is 55%, to be 50%"),
        (
            replace(CALM, utilisation=0.8),
            7,
            "utilisation is 80%, to be 50%, which asks for 7 hosts: 7 instead of 4",
        ),
        (replace(CALM, utilisation=0.75), 6, "which asks for 6 hosts: 6 instead of 4"),
        (
            replace(CALM, utilisation=1.0, hosts_ready=8, hosts_wanted=8),
            10,
            "which asks for 16 hosts, at most 10 may run: 10 instead of 8",
        ),
        (
            replace(CALM, waiting=8),
            8,
            "8 requests wait and 4 run, 0.5 may wait for each, which asks for 8 hosts: 8 instead of 4",
        ),
        (replace(CALM, waiting=8, running=0, utilisation=0.3), 10, "which asks for 24 hosts, at most 10"),
        # What waits for idle hosts waits for something else.
        (replace(CALM, waiting=8, utilisation=0.2), 4, "utilisation is 20%, to be 50%, which asks for 2 hosts, in"),
        (replace(CALM, hosts_ready=3, utilisation=1.0), 4, "1 of 4 hosts not ready"),
        (replace(CALM, hosts_wanted=0, hosts_ready=0), 1, "at least 1 are to run: 1 instead of 0"),
        (replace(CALM, hosts_wanted=12, hosts_ready=12, utilisation=1.0), 11, "at most 10 may run: 11 instead of 12"),
        (replace(CALM, hosts_wanted=12, hosts_ready=13), 12, "a host is being drained"),
        (replace(CALM, utilisation=None, waiting=None), 4, "utilisation is not known yet"),
    ],
)  # fmt: skip
def test_one_look(load: GroupLoad, target: int, reason: str) -> None:
    decision = first(load)
    assert decision.target == target
    assert reason in decision.reason


def test_memory_counts_where_it_is_asked_for() -> None:
    load = replace(CALM, memory_share=0.9)
    assert first(load).target == 4
    settings = SETTINGS.model_copy(update={"memory": 0.6})
    assert first(load, settings=settings).target == 6
    unknown = first(replace(load, memory_share=None, utilisation=0.0), settings=settings)
    assert (unknown.target, unknown.reason) == (4, "memory is not known yet")


def test_an_unknown_metric_does_not_keep_others_from_more_hosts() -> None:
    settings = SETTINGS.model_copy(update={"memory": 0.6})
    assert first(replace(CALM, utilisation=None, memory_share=0.9), settings=settings).target == 6


def test_down_by_one_after_the_whole_window_and_when_the_last_one_is_drained() -> None:
    idle, state, targets = replace(CALM, utilisation=0.1), None, {}
    for now in range(0, 250, 10):
        state, target, _ = step(SETTINGS, state, idle, now)
        if target != idle.hosts_wanted:
            targets[now] = target
            idle = replace(idle, hosts_wanted=target)
        elif now == 230:
            # The first one is drained, long after the window.
            idle = replace(idle, hosts_ready=3)
    assert targets == {100: 3, 240: 2}


def test_one_look_at_more_begins_the_window_anew() -> None:
    state: AutoscaleState | None = None
    for now in range(0, 300, 10):
        busy = 0.5 if now % 90 == 0 else 0.1
        state, target, _ = step(SETTINGS, state, replace(CALM, utilisation=busy), now)
        assert target == 4


def test_what_was_refused_is_asked_for_until_it_is_not_wanted() -> None:
    busy = replace(CALM, utilisation=0.8)
    state, target, _ = step(SETTINGS, AutoscaleState(4, 0.0), busy, 100)
    assert (target, state.asked) == (7, 7)
    tries = []
    for now in range(110, 200, 10):
        state, target, _ = step(SETTINGS, state, busy, now)
        assert state.asked == 7
        if target == 7:
            tries.append(now)
    # A refusal is seen at the next look, and tried again after the pause.
    assert tries == [140, 180]
    for now in range(200, 260, 10):
        state, target, _ = step(SETTINGS, state, CALM, now)
        assert target == 4
    assert state.asked == 0


def test_what_was_granted_is_not_asked_for() -> None:
    state, target, _ = step(SETTINGS, AutoscaleState(4, 0.0), replace(CALM, utilisation=0.8), 100)
    state, target, _ = step(SETTINGS, state, replace(CALM, hosts_wanted=7), 110)
    assert (target, state.asked) == (7, 0)


def test_a_group_that_somebody_scales_is_left_alone_for_the_pauses() -> None:
    state = AutoscaleState(4, 0.0)
    moved = replace(CALM, hosts_wanted=6, hosts_ready=6, utilisation=1.0)
    state, target, _ = step(SETTINGS, state, moved, 1000)
    assert (target, state.changed_at, state.asked) == (6, 1000, 0)
    assert step(SETTINGS, state, moved, 1029).target == 6
    assert step(SETTINGS, state, moved, 1030).target == 10


settings_ = st.builds(
    lambda least, span, busy, queue, memory, up, down: AutoscaleConfig.model_validate(
        {
            "min": least,
            "max": least + span,
            "utilisation": busy,
            "queue": queue,
            "memory": memory,
            "up_cooldown": up,
            "down_cooldown": down,
        }
    ),
    st.integers(1, 6),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.none() | st.floats(0.05, 3),
    st.none() | st.floats(0.05, 1),
    st.integers(1, 60),
    st.integers(1, 200),
)
shares = st.none() | st.floats(0, 1)
requests = st.none() | st.integers(0, 200)
loads = st.builds(GroupLoad, shares, requests, requests, shares, st.integers(0, 20), st.integers(0, 20))


IDLE = GroupLoad(0.0, 0, 0, 0.0, 0, 0)
spells = st.tuples(
    loads | st.just(IDLE),
    st.integers(1, 8),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from((0, 0, 0, 1, -1)),
)
"""What is seen for some looks in a row, the seconds between these, whether what is decided can be, hosts too many."""


@given(settings_, st.lists(spells, min_size=1, max_size=12), st.none() | st.integers(0, 20))
def test_bounds_and_pauses_hold_whatever_is_seen(
    settings: AutoscaleConfig,
    seen_in_spells: list[tuple[GroupLoad, int, int, bool, int]],
    scaled_to: int | None,
) -> None:
    """Half way somebody scales the group to `scaled_to`."""
    now, changed_at, count, state = 0, 0, settings.max, None
    for number, (load, looks, pause, granted, more) in enumerate(seen_in_spells):
        if scaled_to not in (None, count) and number == len(seen_in_spells) // 2:
            count, changed_at = scaled_to, now
        for _ in range(looks):
            now += pause
            seen = replace(load, hosts_wanted=count, hosts_ready=max(0, count + more))
            state, target, reason = step(settings, state, seen, now)
            assert reason
            assert settings.min <= target <= max(settings.max, count)
            assert target >= count - 1
            assert state.asked == 0 or settings.min <= state.asked <= settings.max
            if target < count:
                assert seen.hosts_ready == count
            if settings.min <= count <= settings.max and target != count:
                assert seen.hosts_ready >= count
                pause_s = settings.up_cooldown if target > count else settings.down_cooldown
                assert now - changed_at >= pause_s
            if target != count:
                changed_at = now
                count = target if granted else count


@given(settings_, loads, loads, st.integers(0, 300), st.none() | st.integers(0, 300), st.integers(0, 18))
def test_more_load_is_never_fewer_hosts(
    settings: AutoscaleConfig, one: GroupLoad, other: GroupLoad, now: int, since: int | None, count: int
) -> None:
    def known(first: float | None, second: float | None) -> tuple[float | None, float | None]:
        return (None, None) if first is None or second is None else (min(first, second), max(first, second))

    busy, waiting = known(one.utilisation, other.utilisation), known(one.waiting, other.waiting)
    memory = known(one.memory_share, other.memory_share)
    low, high = (
        GroupLoad(busy[n], waiting[n], one.running, memory[n], one.hosts_ready, count) for n in (0, 1)
    )
    state = AutoscaleState(count, 0.0, since)
    assert step(settings, state, low, now).target <= step(settings, state, high, now).target


@given(settings_, st.floats(0, 12), st.floats(0, 12), st.integers(1, 18))
def test_constant_load_is_answered_once(
    settings: AutoscaleConfig, work: float, weights: float, count: int
) -> None:
    """`work` hosts would compute all the time, `weights` be full; both are divided over those that there are."""
    settings = settings.model_copy(update={"queue": None})
    count = min(max(count, settings.min), settings.max)
    state, counts = None, [count]
    for look in range(18 * 15):
        seen = GroupLoad(min(1.0, work / count), 0, 0, min(1.0, weights / count), count, count)
        state, count, _ = step(settings, state, seen, look * 15)
        if count != counts[-1]:
            counts.append(count)
    assert counts == sorted(counts) or counts == sorted(counts, reverse=True)
    # It comes to rest where no metric is above its target by more than the tolerance, or at the bound.
    memory = settings.memory is not None and min(1.0, weights / count) > 1.1 * float(settings.memory) + 1e-6
    busy = min(1.0, work / count) > 1.1 * float(settings.utilisation) + 1e-6
    assert count == settings.max or not (busy or memory)
