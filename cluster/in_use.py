"""Which placement table each engine says that it uses. Times are seconds of any clock that only goes forward."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TablesInUse:
    """What the engines said when they asked for the next table; used under the controller's lock."""

    since: float
    """When this began to listen: an engine may have been waiting at a controller before."""
    silence_s: float = 45.0
    """An engine that has not asked for so long is gone: one that lives asks more often."""
    _epochs: dict[str, tuple[int, float]] = field(default_factory=dict)

    def heard(self, engine: str, epoch: int, now: float) -> None:
        """An engine asks for what comes after the table that it uses."""
        self._epochs[engine] = epoch, now

    def everywhere(self, epoch: int, now: float) -> bool:
        """Whether every engine uses this table or a later one."""
        self._epochs = {
            engine: (used, at) for engine, (used, at) in self._epochs.items() if now - at <= self.silence_s
        }
        return now - self.since > self.silence_s and all(used >= epoch for used, _ in self._epochs.values())
