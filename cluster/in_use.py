"""Which placement table each engine says that it uses. Times are seconds of any clock that only goes forward."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class _Engine:
    epoch: int
    at: float
    running: frozenset[str]


@dataclass
class TablesInUse:
    """What the engines said when they asked for the next table; used under the controller's lock."""

    since: float
    """When this began to listen: an engine may have been waiting at a controller before."""
    silence_s: float = 45.0
    """An engine that has not asked for so long is gone: one that lives asks more often."""
    _engines: dict[str, _Engine] = field(default_factory=dict)

    def heard(self, engine: str, epoch: int, now: float, running: Collection[str] = ()) -> None:
        """An engine asks for what comes after the table that it uses; requests of these manifests run in it."""
        self._engines[engine] = _Engine(epoch, now, frozenset(running))

    def names(self, now: float) -> list[str]:
        """The engines that there are, as far as they were heard of."""
        self._forget(now)
        return sorted(self._engines)

    def everywhere(self, epoch: int, now: float) -> bool:
        """Whether every engine uses this table or a later one."""
        return now - self.since > self.silence_s and self.acknowledged(epoch, now)

    def acknowledged(self, epoch: int, now: float) -> bool:
        """Whether all engines that were heard of use this table or a later one."""
        self._forget(now)
        return all(engine.epoch >= epoch for engine in self._engines.values())

    def done_with(self, manifest: str, epoch: int, now: float) -> bool:
        """Whether no request of this manifest runs any more; from this table on no new one gets it."""
        return self.everywhere(epoch, now) and not any(
            manifest in engine.running for engine in self._engines.values()
        )

    def _forget(self, now: float) -> None:
        self._engines = {
            name: engine for name, engine in self._engines.items() if now - engine.at <= self.silence_s
        }
