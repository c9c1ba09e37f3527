"""Thousands of random histories of the repair, and that broken rules are found by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster import repair
from cluster.repair_state import (
    Action,
    HostDead,
    HostFailed,
    HostReady,
    Launch,
    NodesSeen,
    Observation,
    Publish,
    Repair,
    Wanted,
)
from tests.unit.cluster.repair_simulator import Broken, Step, live

# 1 to 2 ms each on one core, so no more of them here than find, 95 times in 100, what 12 of 10,000 show. Of the
# rules broken below each shows in 200 or more. Seven times as many are lived through in the integration tests.
HISTORIES, PARTS = 2_500, 5


@pytest.mark.parametrize("part", range(PARTS))
def test_random_histories(part: int) -> None:
    for seed in range(part, HISTORIES, PARTS):
        live(seed)


def test_a_seed_is_one_history() -> None:
    def told(seed: int) -> list[str]:
        from tests.unit.cluster.repair_simulator import History

        lines: list[str] = []
        History(seed, tell=lines.append).run()
        return lines

    assert told(7) == told(7) != told(8)


def sees(change: Callable[[Repair, Observation, float], Observation]) -> Step:
    """A step that sees something else than what there is."""
    return lambda wanted, state, seen, now: repair.step(wanted, state, change(state, seen, now), now)


def does(change: Callable[[Repair, Repair, Action], list[Action]]) -> Step:
    """A step that does something else than what is decided."""

    def step(
        wanted: Wanted, state: Repair, seen: Observation, now: float
    ) -> tuple[Repair, tuple[Action, ...]]:
        after, actions = repair.step(wanted, state, seen, now)
        return after, tuple(done for action in actions for done in change(state, after, action))

    return step


def no_generations(state: Repair, seen: Observation, now: float) -> Observation:
    if isinstance(seen, HostReady | HostFailed | HostDead):
        return replace(seen, generation=state.hosts[seen.host_id].generation)
    return seen


def nodes_of_any_age(state: Repair, seen: Observation, now: float) -> Observation:
    return replace(seen, at=now) if isinstance(seen, NodesSeen) else seen


def endless_memory(state: Repair, seen: Observation, now: float) -> Observation:
    if not isinstance(seen, NodesSeen):
        return seen
    return replace(seen, living=tuple(replace(node, memory_bytes=10**6) for node in seen.living))


def the_silent_are_dead(state: Repair, seen: Observation, now: float) -> Observation:
    """As one that takes a host for dead which can't load, and does not wait for its end."""
    return HostDead(seen.host_id, seen.generation, seen.reason) if isinstance(seen, HostFailed) else seen


def never_publishes(before: Repair, after: Repair, action: Action) -> list[Action]:
    return [] if isinstance(action, Publish) else [action]


def never_launches(before: Repair, after: Repair, action: Action) -> list[Action]:
    return [] if isinstance(action, Launch) else [action]


def launches_twice(before: Repair, after: Repair, action: Action) -> list[Action]:
    return [action, action] if isinstance(action, Launch) else [action]


def one_epoch_for_all(before: Repair, after: Repair, action: Action) -> list[Action]:
    return [replace(action, epoch=1)] if isinstance(action, Publish) else [action]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (sees(no_generations), "while|over|not in the table"),
        (sees(nodes_of_any_age), "while .* lives"),
        (sees(endless_memory), "more than it can"),
        (sees(the_silent_are_dead), "while .* lives"),
        (does(never_publishes), "without a new epoch"),
        (does(never_launches), "when all is calm"),
        (does(launches_twice), "while .* lives"),
        (does(one_epoch_for_all), "epoch 1 after 1"),
    ],
)
def test_a_broken_rule_is_found(broken: Step, found: str) -> None:
    with pytest.raises(Broken, match=found) as error:
        for seed in range(1000):
            live(seed, broken)
    assert "repair_simulator" in str(error.value)
