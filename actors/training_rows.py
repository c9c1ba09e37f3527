"""Rows of a training step: of new samples, and some of what is known.

A pure function of the samples, the seed, the step, and how much of each known domain is wanted. Whoever takes a
training up again, with however many workers, reads the rows that would have come.

Shape suffixes: B = rows of a step, T = tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import LearningError


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What a step is made of."""

    rows: int = 8
    length: int = 128
    """Tokens of a row."""
    replay: float = 0.25
    """Share of the rows that are of what is known; at least one, if it is any."""
    need: float = 0.75
    """Share of those that are of the domains that became worse; see `cluster.learning.replay`."""
    seed: int = 0

    @property
    def replayed(self) -> int:
        """Rows of what is known."""
        return min(self.rows - 1, max(1, round(self.rows * self.replay))) if self.replay else 0


class Rows:
    """Of samples given as token numbers."""

    def __init__(
        self,
        new: Sequence[Sequence[int]],
        old: Mapping[str, Sequence[Sequence[int]]],
        settings: RowSettings,
    ) -> None:
        """`old`: by domain. LearningError if there is nothing to make rows of."""
        self._settings = settings
        self._new = [np.array(tokens, dtype=np.int64) for tokens in new if tokens]
        self._old = {
            domain: found
            for domain, texts in sorted(old.items())
            if (found := [text for text in texts if text])
        }
        self._tokens = sum(map(len, self._new))
        self._lap: tuple[int, np.ndarray] = -1, np.empty(0, dtype=np.int64)
        if not self._tokens:
            raise LearningError("the samples have no tokens", "look at the texts and the tokenizer")
        if settings.replay and not self._old:
            raise LearningError(
                "there is nothing that is known to be replayed",
                "learn something first, or set the share of replay to 0",
            )

    @property
    def known(self) -> tuple[str, ...]:
        """The domains of what is known."""
        return tuple(self._old)

    def domains(self, step: int, weights: Sequence[float] = ()) -> list[str]:
        """Of a step's replayed rows; `weights`: of the known domains, all alike by default."""
        if not self._settings.replayed:
            return []
        dice = random.Random(f"{self._settings.seed} step {step}")
        return dice.choices(self.known, weights or None, k=self._settings.replayed)

    def of_step(self, step: int, weights: Sequence[float] = ()) -> torch.Tensor:
        """int64 [B, T] of a step, counted from 0: new rows first, and then those of `domains`."""
        fresh = self._settings.rows - self._settings.replayed
        rows = [self._fresh(step * fresh + number) for number in range(fresh)]
        rows += [
            self._known(domain, step, number) for number, domain in enumerate(self.domains(step, weights))
        ]
        return torch.from_numpy(np.stack(rows))

    def _fresh(self, number: int) -> np.ndarray:
        """The next tokens of all new samples one behind the other, in laps, each in an order of its own."""
        length, found = self._settings.length, []
        at = number * length
        while length:
            lap, start = divmod(at, self._tokens)
            piece = self._in_lap(lap)[start : start + length]
            found.append(piece)
            at, length = at + len(piece), length - len(piece)
        return np.concatenate(found)

    def _in_lap(self, lap: int) -> np.ndarray:
        if self._lap[0] != lap:
            order = random.Random(f"{self._settings.seed} lap {lap}").sample(self._new, len(self._new))
            self._lap = lap, np.concatenate(order)
        return self._lap[1]

    def _known(self, domain: str, step: int, number: int) -> np.ndarray:
        """Texts of a domain by lot: which, and where it begins."""
        dice = random.Random(f"{self._settings.seed} step {step} row {number}")
        found: list[int] = []
        while len(found) < self._settings.length:
            text = dice.choice(self._old[domain])
            last = max(0, len(text) - self._settings.length)
            found += text[dice.randint(0, last) :]
        return np.array(found[: self._settings.length], dtype=np.int64)


def part_of(rows: int, rank: int, workers: int) -> range:
    """Which rows of a step one of several workers has: as many as the others have, or one more."""
    return range(rank * rows // workers, (rank + 1) * rows // workers)
