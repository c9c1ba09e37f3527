"""What of the stream is worth learning, and what is left out, with the reason."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.learning.records import Record
from cluster.learning.split import fingerprint


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """What is left out."""

    shortest: int = 32
    """Characters of a sample at least."""
    longest: int = 200_000
    least_new: float = 0.1
    """Bytes into which zlib packs a text over the text's: repeated text takes few."""
    most_of_one: int = 200
    """Samples of one owner a day; the operator's own have no bound."""
    least_score: float = 0.5
    """Of samples that a user said something of."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """What is left of some samples."""

    kept: tuple[Record, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason → how many."""

    @property
    def seen(self) -> frozenset[str]:
        """Fingerprints of what was kept."""
        return frozenset(fingerprint(record.text) for record in self.kept)


def filtered(
    records: Iterable[Record], settings: FilterSettings, seen: Collection[str] = frozenset()
) -> Filtered:
    """The samples to learn from; `seen` are the fingerprints of what was kept before."""
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    known = set(seen)
    of_owner: Counter[tuple[str, int]] = Counter()
    for record in records:
        mark = fingerprint(record.text)
        day = record.key, int(record.at // 86400)
        reason = _why_not(record, settings)
        if reason is None and mark in known:
            reason = "duplicate"
        if reason is None and record.key and of_owner[day] >= settings.most_of_one:
            reason = "too many of one owner"
        if reason is not None:
            dropped[reason] += 1
            continue
        known.add(mark)
        of_owner[day] += 1
        kept.append(record)
    return Filtered(tuple(kept), dict(dropped))


def _why_not(record: Record, settings: FilterSettings) -> str | None:
    text = record.text
    if record.kind == "request" and not record.answer.strip():
        return "no answer"
    if len(text) < settings.shortest:
        return "too short"
    if len(text) > settings.longest:
        return "too long"
    if record.score is not None and record.score < settings.least_score:
        return "not liked"
    data = text.encode("utf-8", "surrogatepass")
    if len(zlib.compress(data, 6)) < settings.least_new * len(data):
        return "repeats itself"
    return None
