"""Is one thing worse than another? A test that stays valid however often one looks, by betting.

Each observation is a difference between -1 and 1, positive where the candidate was worse. Two bettors start with one
coin each. One bets that the candidate is worse than the tolerance, at odds that would be fair if it were just
tolerable; the other bets that it is better than the margin, at odds that would be fair if it were just that bad. If
what a bettor bets against is true, its fortune reaches 1/α with probability α at most, ever (Ville's inequality), so
that one may stop at any time. See Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

# Most of its fortune that a bettor puts on one observation: one that loses it all is out for good.
_MOST: Final = 0.9


@dataclass(frozen=True, slots=True)
class Bettor:
    """Bets that the mean of what it sees is above 0. Its fortune as a logarithm."""

    log_fortune: float = 0.0
    seen: int = 0
    total: float = 0.0
    squares: float = 0.0

    def after(self, gain: float) -> Bettor:
        """Having seen one more; `gain` is at least -1."""
        stake = self._stake()
        return Bettor(
            self.log_fortune + math.log1p(stake * gain),
            self.seen + 1,
            self.total + gain,
            self.squares + gain * gain,
        )

    def _stake(self) -> float:
        # What would have grown most on what was seen, as if four observations at the ends had been seen before:
        # nothing at first.
        mean = self.total / (self.seen + 4)
        second = (self.squares + 4 * 0.25) / (self.seen + 4)
        return min(max(mean / second, 0.0), _MOST)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one signal."""

    tolerance: float = 0.0
    """Mean difference up to which a candidate is not worse."""
    margin: float = 0.1
    """Mean difference below which it is good enough; above the tolerance."""
    worse: Bettor = Bettor()
    fine: Bettor = Bettor()

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < self.margin < 1:
            raise ValueError(
                f"a margin of {self.margin} is not above a tolerance of {self.tolerance}, below 1"
            )

    def after(self, differences: Iterable[float]) -> Comparison:
        """Having seen these, each clipped to -1 .. 1."""
        worse, fine = self.worse, self.fine
        for difference in differences:
            clipped = min(max(difference, -1.0), 1.0)
            # Divided, since a gain must not be below -1.
            worse = worse.after((clipped - self.tolerance) / (1 + self.tolerance))
            fine = fine.after(self.margin - clipped)
        return replace(self, worse=worse, fine=fine)

    @property
    def seen(self) -> int:
        """Observations so far."""
        return self.worse.seen

    @property
    def mean(self) -> float:
        """Of the differences so far; 0 before the first."""
        return self.margin - self.fine.total / self.fine.seen if self.fine.seen else 0.0

    def is_worse(self, alpha: float) -> bool:
        """Whether the candidate is worse than tolerable; wrong with probability `alpha` at most, whenever asked."""
        return self.worse.log_fortune >= -math.log(alpha)

    def is_fine(self, alpha: float) -> bool:
        """Whether it is better than the margin; wrong with probability `alpha` at most."""
        return self.fine.log_fortune >= -math.log(alpha)
