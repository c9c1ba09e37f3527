"""Exact optima by HiGHS (SciPy's `milp`), what the planner is held against: small cases only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp


def least_split(held: Sequence[Sequence[int]], rows: np.ndarray, speeds: Sequence[float]) -> float:
    """The least time of the slowest host over all splits of the rows over the hosts that hold the experts."""
    pairs = [(expert, host) for expert, hosts in enumerate(held) for host in hosts]
    shares = np.zeros((len(held), len(pairs) + 1))
    times = np.zeros((len(speeds), len(pairs) + 1))
    times[:, -1] = -1.0
    for column, (expert, host) in enumerate(pairs):
        shares[expert, column] = 1.0
        times[host, column] = rows[expert] / speeds[host]
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    found = linprog(
        cost, A_ub=times, b_ub=np.zeros(len(speeds)), A_eq=shares, b_eq=np.ones(len(held)), method="highs"
    )
    return float(found.fun)


@dataclass(frozen=True, slots=True)
class Exact:
    """What a solver found in its time."""

    seconds: float
    """Of the slowest host under the best placement that it found; infinite if it found none."""
    bound: float
    """No placement takes less."""

    @property
    def optimal(self) -> bool:
        """Whether it is proved that no placement takes less, to a thousandth."""
        return self.seconds <= self.bound * 1.001


def least_placement(
    rows: np.ndarray, speeds: Sequence[float], slots: Sequence[int], limit_s: float = 20.0
) -> Exact:
    """The least time of the slowest host over all placements in the slots, each with its best split."""
    experts, hosts = len(rows), len(speeds)
    pairs = experts * hosts
    # Variables: shares [E, H], whether a blob is there [E, H], the longest time.
    width = 2 * pairs + 1
    constraints = []
    whole = np.zeros((experts, width))
    times = np.zeros((hosts, width))
    room = np.zeros((hosts, width))
    there = np.zeros((pairs, width))
    times[:, -1] = -1.0
    for expert in range(experts):
        for host in range(hosts):
            column = expert * hosts + host
            whole[expert, column] = 1.0
            times[host, column] = rows[expert] / speeds[host]
            room[host, pairs + column] = 1.0
            there[column, column], there[column, pairs + column] = 1.0, -1.0
    constraints = [
        LinearConstraint(whole, 1.0, 1.0),
        LinearConstraint(times, -np.inf, 0.0),
        LinearConstraint(room, -np.inf, np.array(slots, np.float64)),
        LinearConstraint(there, -np.inf, 0.0),
    ]
    cost = np.zeros(width)
    cost[-1] = 1.0
    integer = np.zeros(width)
    integer[pairs : 2 * pairs] = 1
    upper = np.ones(width)
    upper[-1] = np.inf
    found = milp(
        cost,
        constraints=constraints,
        integrality=integer,
        bounds=Bounds(np.zeros(width), upper),
        options={"time_limit": limit_s, "mip_rel_gap": 1e-4},
    )
    return Exact(
        float(found.fun) if found.fun is not None else np.inf,
        float(found.mip_dual_bound) if found.mip_dual_bound is not None else 0.0,
    )
