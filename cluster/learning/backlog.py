"""What of the stream waits to be learnt, domain by domain, and which of it is next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.learning.records import Record
from cluster.learning.split import holdout_of


@dataclass(frozen=True, slots=True)
class Waiting:
    """Samples of one domain that were not used yet."""

    samples: int
    upto: int
    """Number of the last shard with one."""
    oldest: float
    """When the first of them came, in seconds since 1970."""


@dataclass
class Counts:
    """What shards hold, of which each is read once."""

    holdout: float
    shards: dict[int, Mapping[str, tuple[int, float]]] = field(default_factory=dict)
    """Number → domain → samples that may be learnt from, and when the first of them came."""
    held: Counter[str] = field(default_factory=Counter)
    """Domain → samples that are held out, of all shards."""

    def read(self, shards: Iterable[tuple[int, list[Record]]]) -> None:
        """Take in shards that were not read yet."""
        for number, records in shards:
            found: dict[str, tuple[int, float]] = {}
            for record in records:
                if record.kind == "feedback":
                    continue
                if self.holdout and holdout_of(record.text, self.holdout, 1) is not None:
                    self.held[record.domain] += 1
                    continue
                count, oldest = found.get(record.domain, (0, record.at))
                found[record.domain] = count + 1, min(oldest, record.at)
            self.shards[number] = found

    @property
    def last(self) -> int:
        """Number of the latest shard that was read."""
        return max(self.shards, default=0)

    def waiting(self, offsets: Mapping[str, int]) -> dict[str, Waiting]:
        """Domain → what lies behind its offset."""
        found: dict[str, Waiting] = {}
        for number, domains in sorted(self.shards.items()):
            for domain, (count, oldest) in domains.items():
                if number > offsets.get(domain, 0):
                    before = found.get(domain, Waiting(0, 0, oldest))
                    found[domain] = Waiting(before.samples + count, number, min(before.oldest, oldest))
        return found


def next_domain(
    waiting: Mapping[str, Waiting],
    *,
    least: int,
    age_s: float,
    now: float,
    urgent: Collection[str] = (),
) -> str | None:
    """The domain to be learnt now: of those with enough samples, or old ones, the one that waits longest; or None.

    Of an `urgent` one any sample is enough.
    """
    ready = [
        (found.oldest, domain)
        for domain, found in waiting.items()
        if found.samples >= least or (found.samples and (domain in urgent or now - found.oldest >= age_s))
    ]
    return min(ready)[1] if ready else None
