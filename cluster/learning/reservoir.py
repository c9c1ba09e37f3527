"""What is replayed: a bounded sample of all that was ever learnt from, as even over domains as can be.

Each domain has a reservoir of its own (algorithm R: Vitter, "Random Sampling with a Reservoir", 1985), in which every
sample that it has seen is with the same chance. All domains may have as much; what one does not use is free for the
others. Its random state is part of it: taken up again from its bytes, it goes on as if it had never been put down.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from cluster.errors import LearningError
from cluster.learning.records import Record, from_parquet, to_parquet

_MAGIC: Final = b"expertmesh reservoir 1\n"


@dataclass
class _Domain:
    seen: int = 0
    kept: list[Record] = field(default_factory=list)


class Reservoir:
    """Used by one thread."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        """`capacity`: samples at most. LearningError if that is none."""
        if capacity < 1:
            raise LearningError(f"a reservoir for {capacity} samples holds nothing", "give it at least 1")
        self.capacity = capacity
        self._random = random.Random(seed)
        self._domains: dict[str, _Domain] = {}

    def __len__(self) -> int:
        return sum(len(domain.kept) for domain in self._domains.values())

    @property
    def sizes(self) -> Mapping[str, int]:
        """Domain → samples of it that are kept."""
        return {name: len(domain.kept) for name, domain in sorted(self._domains.items())}

    @property
    def kept(self) -> Mapping[str, Sequence[Record]]:
        """Domain → samples of it that are kept."""
        return {name: tuple(domain.kept) for name, domain in sorted(self._domains.items()) if domain.kept}

    def add(self, records: Iterable[Record]) -> None:
        """Have seen these."""
        for record in records:
            domain = self._domains.setdefault(record.domain, _Domain())
            domain.seen += 1
            if len(self) < self.capacity:
                domain.kept.append(record)
            elif len(domain.kept) < max(len(other.kept) for other in self._domains.values()) - 1:
                # This domain has less than its part: the one that has most gives way.
                self._evict()
                domain.kept.append(record)
            elif (place := self._random.randrange(domain.seen)) < len(domain.kept):
                domain.kept[place] = record

    def draw(self, count: int) -> list[Record]:
        """Some samples with repetition: a domain by lot, and one of it by lot. LearningError if there are none."""
        names = [name for name, domain in sorted(self._domains.items()) if domain.kept]
        if not names:
            raise LearningError(
                "the reservoir is empty", "learn something first, or set the share of replay to 0"
            )
        return [self._random.choice(self._domains[self._random.choice(names)].kept) for _ in range(count)]

    def forget(self, key: str) -> int:
        """Take out all samples of one owner; how many."""
        before = len(self)
        for domain in self._domains.values():
            domain.kept = [record for record in domain.kept if record.key != key]
        return before - len(self)

    def to_bytes(self) -> bytes:
        """All of it, its random state too."""
        version, internal, gauss = self._random.getstate()
        head = {
            "capacity": self.capacity,
            "random": [version, list(internal), gauss],
            "domains": {name: [domain.seen, len(domain.kept)] for name, domain in self._domains.items()},
        }
        records = [record for domain in self._domains.values() for record in domain.kept]
        text = json.dumps(head).encode()
        return _MAGIC + len(text).to_bytes(8, "little") + text + to_parquet(records)

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> Reservoir:
        """As it was; `what` names it in errors. LearningError if it is damaged."""
        start = len(_MAGIC) + 8
        end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
        try:
            if not data.startswith(_MAGIC) or end > len(data):
                raise ValueError("it is none, or torn")
            head: dict[str, Any] = json.loads(data[start:end])
            made = cls(int(head["capacity"]))
            version, internal, gauss = head["random"]
            made._random.setstate((version, tuple(internal), gauss))
            counts = {str(name): (int(seen), int(kept)) for name, (seen, kept) in head["domains"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise LearningError(f"{what} is no reservoir: {error}", "take an older one") from error
        records = iter(from_parquet(data[end:], what))
        for name, (seen, kept) in counts.items():
            made._domains[name] = _Domain(seen, list(islice(records, kept)))
        return made

    def _evict(self) -> None:
        largest = max(sorted(self._domains), key=lambda name: len(self._domains[name].kept))
        kept = self._domains[largest].kept
        place = self._random.randrange(len(kept))
        kept[place] = kept[-1]
        kept.pop()
