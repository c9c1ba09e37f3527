"""A shift of the traffic from one task to another, and what online rebalancing makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cluster.fleet import FleetHost, HostCost, PlanSettings
from cluster.planner import FleetPlan, plan
from cluster.routing_windows import RoutingWindows
from workloads.bench.placement_replay import SplitLevels, balance
from workloads.bench.placement_trace import Trace, loads_of

_HOSTS, _SLOTS = 16, 5
_EVERY, _UNTIL = 500, 2000
# As many tokens as there are until the end.
_WINDOWS = 32
_BATCH = 256
_SWEEPS = 500
_GAIN = 0.0005


@dataclass(frozen=True)
class Shift:
    """Balancedness of the new task's traffic, after the tokens in which the rebalancing had to happen."""

    before: float
    """Under the old task's placement."""
    known: float
    """Under the placement of a planner that knew the very tokens that are judged."""
    online: float
    """Under what online rebalancing had made by then."""
    recovered: float
    """(online - before) / (known - before)."""
    moved: int
    needed: int
    """Blobs that the knowing planner loads beyond the old placement, when it counts them."""
    over_time: list[tuple[int, float]]
    """(tokens since the shift, balancedness of the next stretch) as it was rebalanced."""


def shifted(old: Trace, new: Trace, seed: int) -> Shift:
    """Plan for `old`, then serve `new` and rebalance every few hundred tokens."""
    hosts = [FleetHost(f"host-{n}", _SLOTS * old.layers, HostCost()) for n in range(_HOSTS)]
    costs = [host.cost for host in hosts]
    length = _UNTIL // _WINDOWS
    windows = RoutingWindows(old.layers, old.num_experts, windows=_WINDOWS, tokens=length)
    for at in range(max(0, old.tokens - _WINDOWS * length), old.tokens - length + 1, length):
        windows.add(old.counts(at, at + length), length)
    first = plan(
        hosts, loads_of(old.windows(0, old.tokens), _BATCH * old.top_k), None, PlanSettings(seed=seed)
    )
    rest = (_UNTIL, new.tokens)
    knowing = plan(
        hosts,
        loads_of(new.windows(*rest), _BATCH * new.top_k),
        placed(first),
        PlanSettings(seed=seed, gain_per_move=_GAIN),
    )
    now, moved = first, 0
    over_time = [(0, balancedness(new, 0, _EVERY, now, costs))]
    for at, end in pairwise(range(0, _UNTIL + 1, _EVERY)):
        for first_token, last in pairwise(np.linspace(at, end, _WINDOWS * _EVERY // _UNTIL + 1).astype(int)):
            windows.add(new.counts(first_token, last), last - first_token)
        windows.forget()
        now = plan(
            hosts,
            loads_of(windows.counts(), _BATCH * new.top_k),
            placed(now),
            PlanSettings(seed=seed, gain_per_move=_GAIN),
        )
        moved += now.moved
        over_time.append((end, balancedness(new, end, min(end + _EVERY, new.tokens), now, costs)))
    before, known, online = (balancedness(new, *rest, p, costs) for p in (first, knowing, now))
    recovered = (online - before) / max(known - before, 1e-12)
    return Shift(before, known, online, recovered, moved, knowing.moved, over_time)


def placed(planned: FleetPlan) -> dict[int, list[list[str]]]:
    """A plan as the next one's current placement."""
    return {
        layer.layer: [[planned.hosts[h] for h in held] for held in layer.holders] for layer in planned.layers
    }


def balancedness(trace: Trace, first: int, last: int, planned: FleetPlan, costs: list[HostCost]) -> float:
    """Of a stretch of tokens under a plan: per layer, then averaged."""
    levels = SplitLevels([layer.holders for layer in planned.layers], costs, sweeps=_SWEEPS)
    return float(
        np.mean([balance(levels(layer, load)) for layer, load in enumerate(trace.counts(first, last))])
    )
