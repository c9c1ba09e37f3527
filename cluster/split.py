"""The split of the load at hand over replicas, step after step: what is left of the last step is where it begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.balance import even, resume
from cluster.fleet import HostCost

_SWEEPS = 8
# Of all hosts' time; beyond it nobody sees a difference.
_TOLERANCE = 2e-3


class LayerSplit:
    """One layer's shares: who answers how much of each expert, so that the slowest host is done early."""

    def __init__(
        self,
        holders: Sequence[Sequence[int]],
        costs: Sequence[HostCost],
        *,
        sweeps: int = _SWEEPS,
        tolerance: float = _TOLERANCE,
    ) -> None:
        """`holders`: per expert positions of its hosts in `costs`; an expert that nobody holds has none.

        An update makes so many `sweeps` over the experts at most, and ends once one moves less than `tolerance` of
        all hosts' time.
        """
        self._sweeps, self._tolerance = sweeps, tolerance
        experts = len(holders)
        width = max(1, max(map(len, holders), default=1))
        self._holders = np.full((experts, width), -1, np.int32)
        self._copies = np.array([len(held) for held in holders], np.int32)
        for expert, held in enumerate(holders):
            self._holders[expert, : len(held)] = held
        self._fixed = np.array([cost.fixed_s for cost in costs])
        self._per_touch = np.array([cost.per_expert_s for cost in costs])
        self._per_row = np.array([cost.per_row_s for cost in costs])
        self.shares = np.zeros((experts, width))
        """float64 [E, M]: of each expert's load, in the order of its holders."""
        self.seconds = np.zeros(len(costs))
        """float64 [H]: predicted, of the last load."""
        self._touch = np.zeros(experts)
        even(
            self._holders, self._copies, self._touch, self._touch, self._fixed, self._per_touch, self._per_row,
            self.shares, self.seconds,
        )  # fmt: skip

    def update(self, rows: np.ndarray) -> np.ndarray:
        """Level the hosts for a step's rows per expert, float64 [E]; the shares, which stay this object's own."""
        np.minimum(rows, 1.0, out=self._touch)
        resume(
            self._holders, self._copies, self._touch, rows, self._fixed, self._per_touch, self._per_row,
            self.shares, self.seconds, self._tolerance, self._sweeps,
        )  # fmt: skip
        return self.shares
