"""Of which known domains replayed rows are: some of all alike, the rest of those that become worse in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

# Of what the last row of a domain says in its mean.
_NEWEST: Final = 0.1


class Replay:
    """Weights of known domains, by what rows of them said so far."""

    def __init__(self, domains: Sequence[str], need: float) -> None:
        """`need`: the share of rows that goes by need, 0 to 1; the rest is even."""
        self._domains, self._need = tuple(domains), need
        self._risen: dict[str, float] = {}
        """Domain → by how much its rows are worse than by the version before, nats per token; a running mean."""

    def saw(self, rows: Iterable[tuple[str, float]]) -> None:
        """Replayed rows' domains, and by how much each row is worse than by the version before."""
        for domain, risen in rows:
            mean = self._risen.get(domain, risen)
            self._risen[domain] = mean + _NEWEST * (risen - mean)

    @property
    def weights(self) -> list[float]:
        """Of the domains in their order; together 1."""
        worse = [max(0.0, self._risen.get(domain, 0.0)) for domain in self._domains]
        total, count = sum(worse), len(self._domains)
        if not total:
            return [1 / count for _ in worse]
        return [(1 - self._need) / count + self._need * one / total for one in worse]

    def state(self) -> dict[str, float]:
        """What was seen, to be put down."""
        return dict(self._risen)

    def load(self, state: Mapping[str, float]) -> None:
        """Go on where that was put down."""
        self._risen = dict(state)
