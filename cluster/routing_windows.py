"""How often each expert was chosen lately, in windows of some hundred tokens: what the planner's scenarios are.

A decayed average forgets how far loads stray from it; a few windows side by side show that, and forget as they go.
When the traffic changes (`cluster.routing_change`), those from before are dropped at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import sqrt

import numpy as np

from cluster.routing_change import fresh


def scenarios(counts: np.ndarray) -> np.ndarray:
    """float64 [S, L, E]: loads that may come, as shares, from the counts of windows [S, L, E].

    What comes is a mean of further windows. It strays from the mean of S windows by two variances of such a mean, its
    own and the known one's, where each window alone strays by S - 1 of them: windows are drawn to their mean so that
    they stray as far as what comes. A layer without traffic is asked evenly.
    """
    totals = counts.sum(axis=2, keepdims=True)
    even = np.full(counts.shape[1:], 1 / counts.shape[2])
    whole = totals.sum(axis=0)
    mean = np.divide(counts.sum(axis=0), whole, out=even, where=whole > 0)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    # Short windows stray further than long ones.
    length = np.sqrt(np.divide(totals * len(counts), whole, out=np.zeros(totals.shape), where=whole > 0))
    drawn = sqrt(2 / max(1, len(counts) - 1)) * length
    return np.maximum(mean + drawn * (shares - mean), 0.0)


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer's routing in three numbers: bounded, however many experts there are."""

    max_over_mean: float
    dead_share: float
    """Of the experts, how many nobody asked for."""
    effective_experts: float
    """exp of the routing's entropy: as many equally loaded experts would be as uneven."""


def summary(counts: np.ndarray) -> LayerSummary:
    """Of one layer's counts [E]; all zero without any traffic."""
    total = float(counts.sum())
    if total <= 0:
        return LayerSummary(0.0, 0.0, 0.0)
    share = counts[counts > 0] / total
    entropy = float(-(share * np.log(share)).sum())
    return LayerSummary(
        float(counts.max() * len(counts) / total), float((counts == 0).mean()), float(np.exp(entropy))
    )


class RoutingWindows:
    """Counts of the last `windows` windows of `tokens` tokens each; the current one, half full or more, counts too."""

    def __init__(self, layers: int, experts: int, *, windows: int = 32, tokens: int = 512) -> None:
        self._shape, self._tokens = (layers, experts), tokens
        self._full: deque[np.ndarray] = deque(maxlen=windows)
        self._current = np.zeros(self._shape)
        self._seen = 0

    def add(self, counts: np.ndarray, tokens: int) -> None:
        """Add the counts [L, E] of so many tokens."""
        self._current += counts
        self._seen += tokens
        if self._seen >= self._tokens:
            self._full.append(self._current)
            self._current, self._seen = np.zeros(self._shape), 0

    def forget(self) -> int:
        """Drop the windows from before the last change of the traffic, if it changed; returns how many."""
        if not self._full:
            return 0
        known = fresh(np.stack(self._full))
        dropped = len(self._full) - len(known)
        for _ in range(dropped):
            self._full.popleft()
        return dropped

    def counts(self) -> np.ndarray:
        """float64 [S, L, E] of the windows that count, oldest first; without traffic one of zeros."""
        windows = [*self._full]
        if 2 * self._seen >= self._tokens or not windows:
            windows.append(self._current.copy())
        return np.stack(windows)
