"""Which expert lives where, how often: a pure function of hosts, loads, the current placement and settings.

    1. refuse what can't be: memory, pins, failure domains, in numbers         `planner_limits`
    2. every host's memory becomes slots of each layer
    3. per layer: the current copies, and those that are missing, greedily     `placement_greedy`
    4. per layer: a local search over the scenarios of its load                `placement_search`
    5. of all layers' moves the best, up to the limit

Layers are planned in threads, since compiled code lets others run. The same input gives the same plan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.errors import PlacementError
from cluster.fleet import FleetHost, LayerLoad, PlanSettings
from cluster.placement_greedy import copies_wanted, greedy
from cluster.placement_moves import apply_path
from cluster.placement_search import search
from cluster.placement_time import step_seconds
from cluster.planner_limits import allowed_hosts, check, domains, layer_slots
from cluster.planner_moves import affordable

# Copies that a layer's search looks at in all its tries together.
_MOST_WORK, _FEWEST_TRIES = 400_000, 16

Holders = tuple[tuple[int, ...], ...]
"""Per expert the positions of the hosts that hold it."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's placement and what it costs."""

    layer: int
    holders: Holders
    seconds: float
    """Predicted time of its slowest host, averaged over the scenarios."""
    seconds_before: float
    """The same under the current placement, with the copies that it must have; of the greedy one if there is none."""
    loads: tuple[tuple[int, int], ...]
    """(expert, host) of the blobs that are to be loaded."""
    drops: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """A placement of all layers."""

    hosts: tuple[str, ...]
    layers: tuple[LayerPlan, ...]

    @property
    def seconds(self) -> float:
        """Predicted time of a step's experts: the slowest hosts of all layers, added up."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def seconds_before(self) -> float:
        """The same under the current placement."""
        return sum(layer.seconds_before for layer in self.layers)

    @property
    def moved(self) -> int:
        """Blobs that are to be loaded."""
        return sum(len(layer.loads) for layer in self.layers)


@dataclass(frozen=True)
class _Fleet:
    """The hosts as arrays."""

    fixed: np.ndarray
    per_touch: np.ndarray
    per_row: np.ndarray
    domain: np.ndarray
    allowed: np.ndarray
    slots: np.ndarray
    """int32 [L, H]."""


def plan(
    hosts: Sequence[FleetHost],
    loads: Sequence[LayerLoad],
    current: Mapping[int, Sequence[Sequence[str]]] | None,
    settings: PlanSettings,
) -> FleetPlan:
    """Place the layers' experts so that the slowest host of each finishes as early as possible.

    `current`: layer → per expert the ids of the hosts that hold it; ids of hosts that are gone are passed over.
    Raises PlacementError with what is missing, in numbers, if the experts, their least copies or their pins can't be.
    """
    allowed, pin_of = allowed_hosts(hosts, loads, settings.pins)
    check(hosts, loads, settings)
    fleet = _Fleet(
        np.array([host.cost.fixed_s for host in hosts]),
        np.array([host.cost.per_expert_s for host in hosts]),
        np.array([host.cost.per_row_s for host in hosts]),
        domains(hosts, settings.spread),
        allowed,
        layer_slots(hosts, loads),
    )
    position = {host.host_id: index for index, host in enumerate(hosts)}
    starts = [
        [[position[h] for h in holders if h in position] for holders in current[load.layer]]
        if current is not None and load.layer in current
        else None
        for load in loads
    ]

    def one(number: int) -> _Searched:
        return _search(fleet, number, loads[number], pin_of[number], starts[number], settings)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        searched = list(pool.map(one, range(len(loads))))
        prefixes = affordable([(s.path, s.gains, s.needed) for s in searched], settings.max_moves)
        layers = list(pool.map(partial(_finished, fleet), loads, starts, searched, prefixes))
    return FleetPlan(tuple(position), tuple(layers))


@dataclass(frozen=True)
class _Searched:
    """One layer's start and the moves that were found to be worth it, in order."""

    holders: np.ndarray
    copies: np.ndarray
    path: np.ndarray
    gains: np.ndarray
    """Seconds gained by the first 1, 2, ... moves."""
    needed: int
    """Blobs that must be loaded before any move."""


def _search(
    fleet: _Fleet,
    number: int,
    load: LayerLoad,
    pin: np.ndarray,
    start: Sequence[Sequence[int]] | None,
    settings: PlanSettings,
) -> _Searched:
    slots = fleet.slots[number]
    experts = load.rows.shape[1]
    room = np.minimum(slots, experts)
    # Hosts of a pinned expert, as many as may ever hold it.
    most = fleet.allowed[pin].astype(np.int64) @ (room > 0)
    least = np.array(settings.least.get(load.layer, (settings.min_replicas,) * experts), np.int64)
    apart = least if settings.apart is None else np.minimum(least, settings.apart)
    wanted = int(room.sum())
    if settings.redundancy is not None:
        wanted = min(wanted, int(np.ceil(experts * settings.redundancy - 1e-9)))
    wanted = max(wanted, int(least.sum()))
    mean = load.rows.mean(axis=0)
    target = copies_wanted(np.maximum(mean, 1e-12 * max(mean.sum(), 1.0)), least, most, wanted)
    width = min(len(slots), 2 * int(target.max()) + 2)
    holders = np.full((experts, width), -1, np.int32)
    copies = np.zeros(experts, np.int32)
    content = np.full((len(slots), max(1, int(room.max()))), -1, np.int32)
    used = np.zeros(len(slots), np.int32)
    present = np.zeros((len(slots), experts), np.bool_)
    if start is not None:
        for expert, held in enumerate(start):
            present[list(held), expert] = True
        _keep(
            start, room, least, apart, width, fleet.domain, pin, fleet.allowed, holders, copies, content, used
        )
        # Under a limit on what is loaded, only copies that must be are added before the search has its say.
        target = np.maximum(target if settings.max_moves is None else least, copies)
    speed = 1.0 / np.maximum(
        fleet.per_row * mean.mean() + fleet.per_touch * load.touch.mean(), np.finfo(np.float64).tiny
    )
    lacking = greedy(
        mean, target, speed, room.astype(np.int32), least, fleet.domain, apart, pin, fleet.allowed,
        holders, copies, content, used,
    )  # fmt: skip
    if lacking >= 0:
        raise PlacementError(
            f"layer {load.layer}, expert {lacking}: no host for copy {copies[lacking] + 1} of "
            f"{least[lacking]}; pins, memory and failure domains leave none",
            "give the hosts more memory, add hosts, or ask for fewer replicas",
        )
    first_holders, first_copies = holders.copy(), copies.copy()
    needed = int(sum(not present[h, e] for e in range(experts) for h in holders[e, : copies[e]]))
    # Of many copies every try takes longer, and less depends on each.
    tries = min(settings.tries, max(_FEWEST_TRIES, _MOST_WORK // max(1, int(copies.sum()))))
    path = np.zeros((tries, 6), np.int64)
    moves, before, after = search(
        load.touch, load.rows, fleet.fixed, fleet.per_touch, fleet.per_row, room.astype(np.int32), least,
        fleet.domain, apart, pin, fleet.allowed, holders, copies, content, used, present, wanted,
        settings.gain_per_move if start is not None else 0.0, tries, settings.seed, path,
    )  # fmt: skip
    return _Searched(first_holders, first_copies, path[:moves], before - after, needed)


def _keep(start, room, least, apart, width, domain, pin, allowed, holders, copies, content, used) -> None:  # type: ignore[no-untyped-def]
    """What of the current placement may stay: hosts that have too little room lose what has most other copies."""
    kept = [[h for h in held if allowed[pin[e], h]][:width] for e, held in enumerate(start)]
    held_by: dict[int, list[int]] = {}
    for expert, held in enumerate(kept):
        for h in held:
            held_by.setdefault(h, []).append(expert)
    for h, here in held_by.items():
        while len(here) > room[h]:
            spare = max(here, key=lambda e: len(kept[e]) - least[e])
            here.remove(spare)
            kept[spare].remove(h)
    for expert, held in enumerate(kept):
        places = {int(domain[h]): h for h in reversed(held)}
        # What stands beside another of its failure domain leaves room for one elsewhere.
        for h in places.values() if len(places) < apart[expert] else held:
            holders[expert, copies[expert]] = h
            copies[expert] += 1
            content[h, used[h]] = expert
            used[h] += 1


def _finished(
    fleet: _Fleet, load: LayerLoad, start: Sequence[Sequence[int]] | None, found: _Searched, length: int
) -> LayerPlan:
    holders, copies = found.holders.copy(), found.copies.copy()
    arguments = load.touch, load.rows, fleet.fixed, fleet.per_touch, fleet.per_row
    apply_path(found.path[:length], holders, copies)
    after = step_seconds(holders, copies, *arguments)
    before = step_seconds(found.holders, found.copies, *arguments) if length else after
    if after > before:
        # The search also looks at hosts other than the slowest, and may have given some of its time for theirs.
        holders, copies, after = found.holders, found.copies, before
    now = tuple(tuple(sorted(map(int, row[:n]))) for row, n in zip(holders, copies, strict=True))
    old = start if start is not None else [()] * len(now)
    loads = tuple((e, h) for e, held in enumerate(now) for h in held if h not in old[e])
    drops = tuple((e, h) for e, held in enumerate(old) for h in held if h not in now[e])
    return LayerPlan(load.layer, now, after, before, loads, drops)
