"""How often each expert was chosen lately, in windows of some thousand tokens: what the planner's scenarios are.

A decayed average forgets how far loads stray from it; a few windows side by side show that, and forget as they go.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

# Of three values that were tried (0.5, 0.75, 0.9) on two traces the one that is never worse than EPLB without spare
# copies, where the mean says most; with spare copies 0.5 was up to two hundredths better.
_ANCHOR: Final = 0.9


def scenarios(counts: np.ndarray, anchor: float = _ANCHOR) -> np.ndarray:
    """float64 [S, L, E]: each window's shares of the load, from counts [S, L, E], `anchor` of it all windows' mean.

    The mean is more certain than any window, of which part is only noise. A layer without traffic is asked evenly.
    """
    totals = counts.sum(axis=2, keepdims=True)
    even = np.full_like(counts, 1 / counts.shape[2], dtype=np.float64)
    shares = np.divide(counts, totals, out=even, where=totals > 0)
    return anchor * shares.mean(axis=0, keepdims=True) + (1 - anchor) * shares


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

    def __init__(self, layers: int, experts: int, *, windows: int = 8, tokens: int = 2048) -> None:
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

    def counts(self) -> np.ndarray:
        """float64 [S, L, E] of the windows that count, oldest first; without traffic one of zeros."""
        windows = [*self._full]
        if 2 * self._seen >= self._tokens or not windows:
            windows.append(self._current.copy())
        return np.stack(windows)
