"""Has a mean risen above what is tolerable? A sequential test that is looked at after every observation, for ever.

A cumulative sum (Page, "Continuous Inspection Schemes", 1954), of which each step is what a bet against "the mean is
at most tolerable" wins or loses: an e-detector (Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for
sequential change detection", 2024). As long as nothing has changed, a false alarm comes after 1 / rate observations on
average at the earliest, and within n of them with probability n * rate at most, whatever their distribution is:
nothing is assumed but that they are bounded, and tolerable on average given those before. However long nothing
changed, none of the evidence afterwards is spent on making up for that.

Several stakes are played at once, each with its own fortune: large ones see a large change soon, small ones a small
one at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_STAKES: Final = (0.05, 0.15, 0.4, 0.9)


@dataclass(frozen=True, slots=True)
class Detector:
    """What the bets have come to."""

    fortunes: tuple[float, ...] = (0.0,) * len(_STAKES)
    """Logarithms, one for each stake."""
    seen: int = 0
    """Observations."""

    def after(self, gain: float) -> Detector:
        """Having seen one more; `gain` is at least -1, and at most 0 on average while nothing has changed."""
        fortunes = (
            max(fortune, 0.0) + math.log1p(stake * gain)
            for stake, fortune in zip(_STAKES, self.fortunes, strict=True)
        )
        return Detector(tuple(fortunes), self.seen + 1)

    @property
    def evidence(self) -> float:
        """Logarithm of the mean fortune."""
        most = max(self.fortunes)
        return most + math.log(sum(math.exp(f - most) for f in self.fortunes) / len(self.fortunes))

    def alarmed(self, rate: float) -> bool:
        """Whether it has changed; wrong once in 1 / `rate` observations at most."""
        return self.evidence >= -math.log(rate)


def gain(rise: float, slack: float, spread: float) -> float:
    """What a bet gains by a rise: above 0 where that is more than the slack, and at least -1.

    A rise counts up to `spread` either way, so that one strange observation is not all that counts.
    """
    return (min(max(rise, -spread), spread) - slack) / (spread + slack)


def latest(slack: float, spread: float, rise: float, rate: float) -> int:
    """Observations after which a rise that stays is known at the latest, where each of them shows it."""
    won = math.log1p(_STAKES[-1] * gain(rise, slack, spread))
    return math.ceil((math.log(len(_STAKES)) - math.log(rate)) / won)
