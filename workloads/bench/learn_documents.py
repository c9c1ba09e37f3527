"""Texts as documents: cleaned, cut, each once, and as many as are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Final

from cluster.learning.filters import FilterSettings
from cluster.learning.sources import LONGEST, pieces
from cluster.learning.split import fingerprint
from workloads.bench.learn_texts import tidied

_SHORTEST: Final = FilterSettings().shortest


def documents_of(texts: Iterable[str]) -> list[str]:
    """Texts as documents: without rubbish, without what most of them repeat, cut between paragraphs, each once."""
    seen: set[str] = set()
    found = []
    for text in without_boilerplate([tidied(text) for text in texts]):
        # In two steps, since each step copies what is left of the text for every piece.
        for piece in (piece for part in pieces(text, 50 * LONGEST) for piece in pieces(part, LONGEST)):
            if len(piece) >= _SHORTEST and (mark := fingerprint(piece)) not in seen:
                seen.add(mark)
                found.append(piece)
    return found


def without_boilerplate(
    texts: Sequence[str], share: float = 0.02, least: int = 5, shortest: int = 60
) -> list[str]:
    """Texts without the longer paragraphs that a share of them has, and `least` of them at least: licences, notices."""
    often = Counter(
        paragraph
        for text in texts
        for paragraph in {part.strip() for part in text.split("\n\n") if len(part.strip()) >= shortest}
    )
    bound = max(least, share * len(texts))
    return ["\n\n".join(part for part in text.split("\n\n") if often[part.strip()] < bound) for text in texts]


def chosen(kinds: Sequence[Sequence[str]], limit: int, seed: str) -> list[str]:
    """Documents of up to `limit` bytes in all, in equal parts of all kinds as far as each has so much, in random order.

    Chance is a hash of the seed and the document, so that it is the same whatever else there is.
    """

    def lot(text: str) -> str:
        return sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()

    taken: list[str] = []
    left = limit
    # The smallest first: what a kind lacks, the others may have more of.
    for rest, texts in zip(range(len(kinds), 0, -1), sorted(kinds, key=_size), strict=True):
        share = left // rest
        for text in sorted(texts, key=lot):
            length = len(text.encode("utf-8")) + 1
            if length > share:
                break
            taken.append(text)
            share -= length
            left -= length
    return sorted(taken, key=lot)


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8")) + 1 for text in texts)
