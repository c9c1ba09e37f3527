"""`expertmesh learn status`: how far a loop is, what waits, what became of the last rounds, and what is done now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from cluster.config_learning import LearningConfig
from cluster.errors import VersionError
from cluster.learning.backlog import Counts, Waiting
from cluster.learning.drift import DriftState, Track
from cluster.learning.journal import Journal, LoopState, Round
from cluster.learning.stream import Stream
from cluster.versions.files import Files
from workloads.learn_drift import load

_DOING: Final = "doing"
_TELL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Doing:
    """What a loop does."""

    what: str
    done: float
    """0 to 1."""
    at: float
    """Seconds since 1970."""
    waits_for: dict[str, str]
    """Domain → why there is no round of it."""


_FORM: Final = TypeAdapter(Doing)


class Teller:
    """Says what a loop does, once a second at most; what can't be said is left out."""

    def __init__(self, files: Files, *, clock: Callable[[], float] = time.time) -> None:
        self._files, self._clock = files, clock
        self._told: Doing | None = None

    def __call__(self, what: str, done: float, waits_for: dict[str, str] | None = None) -> None:
        now = Doing(what, done, self._clock(), dict(waits_for or {}))
        told = self._told
        if told is None or now.what != told.what or now.at - told.at >= _TELL_S:
            self._told = now
            try:
                self._files.renew(_DOING, _FORM.dump_json(now))
            except VersionError:
                return


def doing(files: Files) -> Doing | None:
    """What was said last; None if nothing was."""
    try:
        return _FORM.validate_json(files.read(_DOING)) if files.has(_DOING) else None
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class Status:
    """All of it."""

    state: LoopState
    waiting: dict[str, Waiting]
    replayed: dict[str, int]
    """Domain → samples in the reservoir."""
    doing: Doing | None
    drift: DriftState


def status_of(files: Files, stream: Stream, settings: LearningConfig) -> Status:
    """How far a loop is. LearningError if its journal or the stream is damaged."""
    journal = Journal(files)
    state = journal.load()
    counts = Counts(settings.holdout)
    counts.read(stream.after(0))
    replayed = dict(journal.replayed(state, settings.reservoir).sizes)
    return Status(state, counts.waiting(state.offsets), replayed, doing(files), load(files))


def as_json(status: Status) -> dict[str, Any]:
    """For a program."""
    state = status.state
    return {
        "doing": asdict(status.doing) if status.doing else None,
        "round": asdict(state.now) if state.now else None,
        "rounds": [asdict(past) for past in state.past],
        "offsets": dict(state.offsets),
        "waiting": {domain: asdict(found) for domain, found in sorted(status.waiting.items())},
        "replayed": status.replayed,
        "drift": {
            "trouble": status.drift.trouble,
            "domains": {domain: _track_json(track) for domain, track in sorted(status.drift.tracks.items())},
        },
    }


def _track_json(track: Track) -> dict[str, Any]:
    return {
        "alarm": asdict(track.alarm) if track.alarm else None,
        "alarms": track.alarms,
        "live_reference": track.reference.mean or None,
        "evidence": {"holdout": track.holdout.evidence, "live": track.live.evidence},
        "points": [asdict(point) for point in track.points],
    }


def as_text(status: Status, now: float) -> tuple[str, Table, Table | None]:
    """For a person: what is done, domains, and the last rounds."""
    lines = []
    if status.state.now is not None:
        lines.append(f"round {status.state.now.number}: {status.state.now.domain}, {status.state.now.phase}")
    if status.doing is not None:
        done = f" {status.doing.done:.0%}" if 0 < status.doing.done < 1 else ""
        lines.append(f"{status.doing.what}{done}, {max(0.0, now - status.doing.at):.0f} s ago")
        lines += [f"{domain} waits: {why}" for domain, why in sorted(status.doing.waits_for.items())]
    if status.drift.trouble:
        lines.append(f"drift can't be measured: {status.drift.trouble}")
    for name, track in sorted(status.drift.tracks.items()):
        if track.alarm is not None:
            at = datetime.fromtimestamp(track.alarm.at, UTC).strftime("%m-%d %H:%M")
            lines.append(f"ALARM {name} gets worse since {at}: {track.alarm.said}")
    domains = Table("domain", "up to shard", "samples that wait", "replayed", "held out", "live")
    for name in sorted({*status.state.offsets, *status.waiting, *status.replayed, *status.drift.tracks}):
        waiting = status.waiting[name].samples if name in status.waiting else 0
        domains.add_row(
            name,
            str(status.state.offset(name)),
            str(waiting),
            str(status.replayed.get(name, 0)),
            *drift_text(status.drift.tracks.get(name, Track())),
        )
    rounds = Table("round", "domain", "ended", "", "samples", "bits per byte", "why")
    for past in status.state.past[-10:]:
        rounds.add_row(
            str(past.number),
            past.domain,
            datetime.fromtimestamp(past.ended, UTC).strftime("%m-%d %H:%M"),
            past.phase,
            str(past.samples),
            bits_text(past),
            "\n".join(past.reasons),
        )
    return "\n".join(lines), domains, rounds if status.state.past else None


def drift_text(track: Track) -> tuple[str, str]:
    """The latest bits per byte of held-out text and of what came in, and what they are held against."""
    held = next((point for point in reversed(track.points) if point.holdout is not None), None)
    live = next((point.live for point in reversed(track.points) if point.live is not None), None)
    rise = f" ({held.rise:+.1%})" if held is not None and held.rise is not None else ""
    before = f" (after {track.reference.mean:.3f})" if track.live.seen else ""
    return (
        f"{held.holdout:.3f}{rise}" if held is not None else "",
        f"{live:.3f}{before}" if live is not None else "",
    )


def bits_text(past: Round) -> str:
    """Before and after, of what a round was to learn; "" if it was not judged."""
    found = [past.metrics.get(f"bits_per_byte.{past.domain}.{when}") for when in ("before", "after")]
    return " → ".join(f"{bits:.4f}" for bits in found if bits is not None)
