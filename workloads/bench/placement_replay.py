"""What placements make of a trace: how evenly hosts are loaded, and how long steps take. Pure functions.

Shape suffixes: S = steps, L = layers, E = experts, H = hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.fleet import HostCost
from cluster.split import LayerSplit
from workloads.bench.placement_baselines import Copies
from workloads.bench.placement_trace import Trace

Placed = Sequence[Sequence[Sequence[int]]]
"""Per layer and expert the positions of its hosts."""


Levels = Callable[[int, np.ndarray], np.ndarray]
"""Layer and its rows per expert [E] → seconds of each host [H]."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One placement on one stretch of a trace."""

    balancedness: float
    """Mean over longest host time, per layer, then averaged: 1 is even."""
    step_p50_s: float
    step_p99_s: float


def judge(trace: Trace, first: int, last: int, batch: int, whole: Levels, step: Levels) -> Judged:
    """Balancedness of the whole stretch of tokens, and quantiles of its steps of `batch` tokens each."""
    balances = [balance(whole(layer, load)) for layer, load in enumerate(trace.counts(first, last))]
    steps = [
        sum(float(step(layer, load).max()) for layer, load in enumerate(trace.counts(at, at + batch)))
        for at in range(first, last - batch + 1, batch)
    ]
    p50, p99 = np.quantile(steps or [0.0], (0.5, 0.99)).tolist()
    return Judged(float(np.mean(balances)), p50, p99)


class SplitLevels:
    """Replicas share an expert's load so that the slowest host is done early, as the dispatcher is to have them."""

    def __init__(self, placed: Placed, costs: Sequence[HostCost], **settings: int) -> None:
        self._splits = [LayerSplit(holders, costs, **settings) for holders in placed]

    def __call__(self, layer: int, load: np.ndarray) -> np.ndarray:
        split = self._splits[layer]
        split.update(load)
        return split.seconds


class EvenLevels:
    """Replicas share an expert's load evenly."""

    def __init__(self, copies: Sequence[Copies], costs: Sequence[HostCost]) -> None:
        self._copies = copies
        self._fixed = np.array([cost.fixed_s for cost in costs])
        self._per_touch = np.array([cost.per_expert_s for cost in costs])
        self._per_row = np.array([cost.per_row_s for cost in costs])

    def __call__(self, layer: int, load: np.ndarray) -> np.ndarray:
        experts, hosts = self._copies[layer]
        number = np.bincount(experts, minlength=len(load))
        rows = load[experts] / number[experts]
        wide = len(self._fixed)
        # A copy with less than a row a step is asked in that share of the steps.
        touched = np.bincount(hosts, np.minimum(rows, 1.0), wide)
        return self._fixed + self._per_touch * touched + self._per_row * np.bincount(hosts, rows, wide)


def balance(seconds: np.ndarray) -> float:
    """Mean over longest of the hosts' times; 1 where nobody has anything to do."""
    longest = float(seconds.max())
    return float(seconds.mean()) / longest if longest > 0 else 1.0
