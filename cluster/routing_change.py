"""Has the traffic changed? Windows of routing counts from before a change say nothing of what comes.

The counts before and after every possible split of the windows are compared. How far their means may be apart by
chance is taken from how far windows stray within the two parts, not from a distribution of single tokens: tokens of
one text resemble each other, so that windows stray more than independent choices would. Experts and layers stray
together, in far fewer independent directions than there are experts; how many is estimated as well (Bai and
Saranadasa, "Effect of high dimension: by an example of a two sample problem", 1996). The ratio of the two distances is
then F-distributed, near enough.

Shape letters: S = windows, B = blocks of windows, L = layers, E = experts.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import Final

import numpy as np

# Planning once a minute, traffic that never changes is taken for changed once in two months.
_FALSE_ALARMS: Final = 1e-3
# Neighbouring windows share texts. Long blocks of them are nearly independent, short ones would seem to stray less.
_BLOCKS: Final = 8
# Two parts of one block each have no differences within them, and of a single one no directions can be told.
_FEWEST: Final = 4


def fresh(counts: np.ndarray) -> np.ndarray:
    """The windows since the last change of the traffic, of windows of counts [S, L, E], oldest first; at least one.

    All layers are looked at together. A change counts once it has lasted for an eighth of the windows.
    """
    size = -(-len(counts) // _BLOCKS)
    # From the newest windows on backwards, or an earlier change would hide a later one.
    lengths = range(_FEWEST * size, len(counts) + size, size)
    for length in lengths:
        first = _change(counts[-length:], size, _FALSE_ALARMS / len(lengths))
        if first:
            return counts[-length:][first:]
    return counts


def _change(counts: np.ndarray, size: int, false_alarms: float) -> int:
    """The first window after the change, 0 if there is none, or none that has lasted for `size` windows."""
    tokens, shares, scale = _standard(counts)
    apart = _distances(tokens, shares, scale)
    first = 1 + int(np.argmax(apart))
    if len(counts) - first < size:
        return 0
    alarm = NormalDist().inv_cdf(1 - false_alarms / len(apart))
    return first if _deviations_of(counts, first, size, float(apart[first - 1]), scale) > alarm else 0


def _distances(tokens: np.ndarray, shares: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[S - 1]: squared distances of the means on either side of each split.

    By chance each is on average as much as windows stray, times their tokens.
    """
    before = np.cumsum(tokens, axis=0)
    after = before[-1] - before[:-1]
    chosen = np.cumsum(tokens * shares, axis=0)
    found = np.empty(len(tokens) - 1)
    for split in range(len(found)):
        one, other = before[split], after[split]
        weight = _quotient(one * other, one + other)
        apart = _quotient(chosen[split], one) - _quotient(chosen[-1] - chosen[split], other)
        found[split] = (weight * (apart * scale) ** 2).sum()
    return found


def _deviations_of(counts: np.ndarray, first: int, size: int, apart: float, scale: np.ndarray) -> float:
    """By how many standard deviations the parts before and after window `first` differ more than by chance."""
    strays = np.concatenate([_strays(counts[:first][::-1], size), _strays(counts[first:], size)])
    if len(strays) < _FEWEST:
        return 0.0
    flat = (strays * scale).reshape(len(strays), -1)
    gram = flat @ flat.T
    freedom = len(strays) - 2
    variance = float(np.trace(gram)) / freedom
    if variance <= 0.0:
        return np.inf if apart > 0.0 else 0.0
    # Never more than there are blocks: with too few directions an alarm is late, with too many it is false.
    directions = float(np.trace(gram)) ** 2 / float((gram**2).sum())
    return _deviations(apart / variance, directions, directions * freedom)


def _strays(windows: np.ndarray, size: int) -> np.ndarray:
    """[B, L, E]: how far the shares of blocks of windows are from all the windows', of equal variance per expert."""
    blocks = np.stack([windows[at : at + size].sum(axis=0) for at in range(0, len(windows), size)])
    tokens, shares, _ = _standard(blocks)
    return (shares - _mean(tokens, shares)) * np.sqrt(tokens)


def _standard(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choices [B, L, 1], shares [B, L, E], and what makes the shares' variances equal [L, E]."""
    tokens = blocks.sum(axis=2, keepdims=True)
    shares = _quotient(blocks, tokens)
    return tokens, shares, 1.0 / np.sqrt(_mean(tokens, shares) + 1 / shares.shape[2])


def _mean(tokens: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return _quotient((tokens * shares).sum(axis=0), tokens.sum(axis=0))


def _quotient(above: np.ndarray | float, below: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return np.where(below > 0, above, 0.0) / np.where(below > 0, below, 1.0)


def _deviations(ratio: float, one: float, other: float) -> float:
    """A variable of Fisher's F as a normal one (Paulson, 1942), close for more than two degrees of freedom."""
    root = ratio ** (1 / 3)
    first, second = 2 / (9 * one), 2 / (9 * other)
    return ((1 - second) * root - (1 - first)) / sqrt(first + second * root**2)
