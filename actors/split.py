"""One layer's replicas in use: who answers which rows of the step at hand, by the hosts' costs as they are now.

Used where an expert has several hosts that are asked; where none has, a fixed look-up does (`actors.route.owners`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np

from actors.route import NOBODY, Owners, Replicas
from cluster.assign import count, divided, whole
from cluster.messages import HostCost

# From so many rows an expert on, its rows are divided: before, reading its weights twice costs more than it saves.
_MANY: Final = 8.0


class Split:
    """Of one layer; its arrays are kept from step to step."""

    def __init__(self, replicas: Replicas, asked: Collection[int], costs: Sequence[HostCost]) -> None:
        """`asked`: positions in `costs` of the hosts that may be asked."""
        able = [[host for host in hosts if host in asked] for hosts in replicas]
        experts, hosts = len(able), len(costs)
        width = max(1, max(map(len, able)))
        self._holders = np.full((experts, width), NOBODY, np.int32)
        self._copies = np.array([len(held) for held in able], np.int32)
        for expert, held in enumerate(able):
            self._holders[expert, : len(held)] = held
        self._fixed, self._per_touch, self._per_row = np.zeros(hosts), np.zeros(hosts), np.zeros(hosts)
        self.set_costs(costs)
        self._rows, self._touch, self._passed = np.zeros(experts), np.zeros(experts), np.zeros(experts)
        self._level, self._order = np.zeros(hosts), np.zeros(experts, np.int32)
        self._share = np.zeros((experts, width))
        self._owner = np.full(experts + 1, NOBODY, np.int16)
        self._complete = bool((self._copies > 0).all())

    def set_costs(self, costs: Sequence[HostCost]) -> None:
        """What the hosts cost from now on."""
        for host, cost in enumerate(costs):
            self._fixed[host], self._per_touch[host] = cost.fixed_s, cost.per_expert_s
            self._per_row[host] = cost.per_row_s

    def owners(self, ids: np.ndarray) -> tuple[Owners, np.ndarray | None]:
        """For the ids int32 [P] of a step: who owns each expert, and who answers each pair [P] where that differs.

        What is returned is overwritten by the next call. IndexError for an id past the layer's.
        """
        active = count(ids, self._rows)
        if active < 0:
            raise IndexError(f"expert {ids.max()} of a layer that has {len(self._rows)}")
        if active and len(ids) >= _MANY * active:
            hosts = np.empty(len(ids), np.int16)
            divided(
                ids, self._rows, self._holders, self._copies, self._fixed, self._per_touch, self._per_row,
                self._share, self._level, self._touch, self._passed, hosts,
            )  # fmt: skip
            self._owner[:-1] = self._holders[:, 0]
            return Owners(self._owner, [], self._complete), hosts
        whole(
            self._rows, self._holders, self._copies, self._fixed, self._per_touch, self._per_row, self._level,
            self._order, self._owner[:-1],
        )  # fmt: skip
        return Owners(self._owner, self._owner.tolist(), self._complete), None
