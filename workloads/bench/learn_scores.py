"""What a stream of domains did to a model: pure functions of a matrix of bits per byte.

Row 0 is the model before anything was learnt, row i after the i-th domain; a column for each domain, in the order in
which they were learnt. Lower is better. After Lopez-Paz and Ranzato, "Gradient Episodic Memory" (2017), with signs so
that more is better for transfer and less for forgetting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Bits per byte, or shares of them."""

    average: float
    """Over all domains, in the end."""
    backward_transfer: float
    """By how much domains became better after they were learnt; below 0 where they were forgotten."""
    forgetting: float
    """By how much domains are worse in the end than at their best since they were learnt."""
    forward_transfer: float
    """By how much domains became better before they were learnt."""
    retention: float
    """Of the general set: bits per byte before over those in the end; 1 where nothing was lost."""


def scores(matrix: Matrix, general: Sequence[float]) -> Scores:
    """`general`: the general set's bits per byte, row by row. ValueError for a matrix of another shape."""
    domains = len(matrix) - 1
    if domains < 1 or any(len(row) != domains for row in matrix) or len(general) != len(matrix):
        raise ValueError(f"{len(matrix)} rows of {[len(row) for row in matrix]} columns")
    last = matrix[-1]
    learnt = range(domains - 1)
    later = range(1, domains)
    return Scores(
        average=_mean(last),
        backward_transfer=_mean([matrix[d + 1][d] - last[d] for d in learnt]),
        forgetting=_mean(
            [last[d] - min(matrix[row][d] for row in range(d + 1, domains + 1)) for d in learnt]
        ),
        forward_transfer=_mean([matrix[0][d] - matrix[d][d] for d in later]),
        retention=general[0] / general[-1],
    )


def gap_closed(mine: float, naive: float, joint: float) -> float | None:
    """The share of the way from naive to joint training, by averages; None where naive is no worse than joint."""
    return (naive - mine) / (naive - joint) if naive > joint else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
