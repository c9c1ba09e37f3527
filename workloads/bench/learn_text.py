"""Texts of domains as token numbers: windows that are judged, and rows that are learnt.

Shape suffixes: W = windows, B = rows of a step, T = tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.errors import LearningError
from cluster.learning.split import holdout_of

Encode = Callable[[str], list[int]]
Tokens = npt.NDArray[np.int32]

# Held-out share of a domain's texts.
_HELD_OUT: Final = 0.1
_LEAST_TEXTS: Final = 20


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain, divided before anything else sees it."""

    name: str
    learnt: Tokens
    """All texts of it that may be learnt, one after the other."""
    judged_WT: Tokens
    """Windows of held-out text; each but the first token of a window is predicted."""
    judged_bytes: int
    """Of all text that is predicted."""


def read_domain(folder: Path) -> tuple[str, list[str]]:
    """A folder's name and its texts. LearningError if it can't be read, or has too few."""
    if not folder.is_dir():
        raise LearningError(f"no such folder: {folder}", "make some with `expertmesh bench domains DIR`")
    texts = []
    for file in sorted(folder.rglob("*.txt")):
        try:
            texts.append(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise LearningError(f"{file} can't be read: {error}", "text in UTF-8 is expected") from error
    if len(texts) < _LEAST_TEXTS:
        raise LearningError(
            f"{folder} has {len(texts)} texts, {_LEAST_TEXTS} are needed at least",
            "one file (*.txt) is one text",
        )
    return folder.name, texts


def divide(
    name: str, texts: Sequence[str], encode: Encode, *, window: int, most_judged: int, most_learnt: int
) -> Domain:
    """Held-out text is by hash; of each side as many tokens as asked for, in an order that depends on nothing else.

    LearningError if one side is too small.
    """
    order = list(texts)
    random.Random(name).shuffle(order)
    learnt: list[int] = []
    windows: list[list[int]] = []
    size = 0
    for text in order:
        if holdout_of(text, _HELD_OUT, 1) is None:
            if len(learnt) < most_learnt:
                learnt += encode(text)
            continue
        if len(windows) * window >= most_judged:
            continue
        tokens = encode(text)
        # Only whole windows are judged, all of one length, so that they can be judged many at a time.
        starts = range(0, len(tokens) - window, window - 1)
        for start in starts:
            windows.append(tokens[start : start + window])
        if starts:
            whole = tokens[: starts[-1] + window]
            size += _bytes_of(text, len(whole), len(tokens))
    if len(windows) < 8 or len(learnt) < 20 * window:
        raise LearningError(
            f"{name} has {len(learnt)} tokens to learn and {len(windows)} held-out windows of {window}",
            "give more text, or shorter windows",
        )
    return Domain(name, np.array(learnt, np.int32), np.array(windows, np.int32), size)


def _bytes_of(text: str, whole: int, tokens: int) -> int:
    """Bytes of the first `whole` of a text's tokens, by their share: the same for all methods."""
    return round(len(text.encode()) * whole / tokens)
