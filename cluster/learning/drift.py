"""Does what serves get worse, domain by domain? Two tracks of bits per byte of each, and an alarm when one has risen.

    holdout   texts that are never learnt from, each against what it took when it was first read: what one round after
              the other forgets, be each of them tolerable by itself. A version reads a text once, since reading it
              again says nothing new; parts of the holdout take turns.
    live      what came in lately (prompts of requests, and texts), each once, against the mean of the first ones:
              people ask for something else. Not answers: those are the model's own, and it finds them likely even if
              they are wrong.

After a round that learnt the domain both begin anew with what is had by then; after one that was in vain only the
evidence does, so that an alarm begins one round and not one after the other. Pure functions; `change` is the test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from cluster.learning.change import Detector, gain
from cluster.learning.journal import ACCEPTED, Round

What = Literal["holdout", "live"]

_SPREAD: Final[Mapping[What, float]] = {
    # The same text by two versions: a fifth more is a lot.
    "holdout": 0.2,
    # Another text: twice the mean is nothing strange.
    "live": 1.0,
}
# Standard errors that the live reference is taken higher by, so that a mean that came out low is no alarm.
_SURE: Final = 2.33
_POINTS: Final = 50
_MARKS: Final = 2000


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """When it is an alarm."""

    slack: float = 0.02
    """Rise of the bits per byte, as a share, that is tolerable."""
    false_alarms: float = 1e-4
    """Of all texts that are read, at most."""
    warm: int = 128
    """Live texts whose mean is what later ones are held against."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Live texts before anything changed, in bits per byte."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def after(self, bits: float) -> Reference:
        """With one more."""
        return Reference(self.count + 1, self.total + bits, self.squares + bits * bits)

    @property
    def mean(self) -> float:
        """0 of none."""
        return self.total / self.count if self.count else 0.0

    @property
    def high(self) -> float:
        """What their mean is at most, near enough for sure."""
        if not self.count:
            return 0.0
        variance = max(0.0, self.squares / self.count - self.mean**2)
        return self.mean + _SURE * math.sqrt(variance / self.count)


@dataclass(frozen=True, slots=True)
class Point:
    """What one look found of a domain; None where nothing was read."""

    at: float
    """Seconds since 1970."""
    manifest: str
    holdout: float | None
    """Bits per byte of the texts that were read."""
    rise: float | None
    """Of the same texts, since they were first read, as a share."""
    live: float | None
    texts: tuple[int, int]
    """Held out, and live."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A track has risen."""

    what: What
    at: float
    manifest: str
    """That served."""
    said: str


@dataclass(frozen=True, slots=True)
class Track:
    """One domain's."""

    first: Mapping[str, float] = field(default_factory=dict)
    """Held-out text → bits per byte when it was first read."""
    reader: str = ""
    """The version that read last."""
    read: tuple[str, ...] = ()
    """Held-out texts that it has read."""
    holdout: Detector = field(default_factory=Detector)
    reference: Reference = Reference()
    live: Detector = field(default_factory=Detector)
    points: tuple[Point, ...] = ()
    alarm: Alarm | None = None
    """Until a round of the domain has ended."""
    alarms: int = 0
    """That there ever were."""

    def unread(self, manifest: str, marks: Sequence[str]) -> list[str]:
        """Those of some held-out texts that a version has not read yet."""
        read = frozenset(self.read if self.reader == manifest else ())
        return [mark for mark in marks if mark not in read]


@dataclass(frozen=True, slots=True)
class DriftState:
    """All that is known of drift."""

    tracks: Mapping[str, Track] = field(default_factory=dict)
    """By domain."""
    upto: int = 0
    """Number of the last shard of which live texts were read."""
    rounds: int = 0
    """Number of the last round whose end is known here."""
    looks: int = 0
    at: float = 0.0
    """When the last look was, in seconds since 1970."""
    trouble: str = ""
    """Why it came to nothing; "" where it did not."""
    form: int = 1
    """Of this document."""


def looked(
    track: Track,
    manifest: str,
    held: Sequence[tuple[str, float]],
    live: Sequence[float],
    settings: DriftSettings,
    now: float,
) -> Track:
    """With what a version took for texts that it had not read: held-out ones by name, and live ones; bits per byte.

    Values that are no numbers count as the worst there can be.
    """
    first, holdout = dict(track.first), track.holdout
    before = after = 0.0
    for mark, bits in held:
        if mark in first:
            before, after = before + first[mark], after + bits
            holdout = holdout.after(_gain("holdout", bits, first[mark], settings))
        elif math.isfinite(bits):
            first[mark] = bits
    reference, live_track = track.reference, track.live
    for bits in live:
        if reference.count < settings.warm:
            reference = reference.after(bits) if math.isfinite(bits) else reference
        else:
            live_track = live_track.after(_gain("live", bits, reference.high, settings))
    read = (*(track.read if track.reader == manifest else ()), *(mark for mark, _ in held))
    rise = after / before - 1 if before else None
    found = Point(now, manifest, _mean([bits for _, bits in held]), rise, _mean(live), (len(held), len(live)))
    track = replace(
        track,
        first=dict(list(first.items())[-_MARKS:]),
        reader=manifest,
        read=read[-_MARKS:],
        holdout=holdout,
        reference=reference,
        live=live_track,
        points=(*track.points, found)[-_POINTS:],
    )
    return _judged(track, settings)


def answered(state: DriftState, past: Sequence[Round]) -> DriftState:
    """With the rounds that ended since: alarms of their domains are over."""
    tracks = dict(state.tracks)
    for ended in past:
        if ended.number > state.rounds and ended.phase != "superseded" and ended.domain in tracks:
            before = tracks[ended.domain]
            if ended.phase in ACCEPTED:
                tracks[ended.domain] = Track(points=before.points, alarms=before.alarms)
            else:
                tracks[ended.domain] = replace(before, holdout=Detector(), live=Detector(), alarm=None)
    return replace(state, tracks=tracks, rounds=max((state.rounds, *(ended.number for ended in past))))


def alarmed(state: DriftState) -> frozenset[str]:
    """Domains with an alarm."""
    return frozenset(domain for domain, track in state.tracks.items() if track.alarm is not None)


def _judged(track: Track, settings: DriftSettings) -> Track:
    last = track.points[-1]
    if track.alarm is not None:
        return track
    if track.holdout.alarmed(settings.false_alarms):
        rise = f"{last.rise:+.1%} bits per byte" if last.rise is not None else "bits per byte have risen"
        said = f"held-out text takes {rise} since it was first read"
        alarm = Alarm("holdout", last.at, last.manifest, said)
    elif track.live.alarmed(settings.false_alarms):
        said = f"what comes in takes {last.live or 0.0:.3f} bits per byte, after {track.reference.mean:.3f}"
        alarm = Alarm("live", last.at, last.manifest, said)
    else:
        return track
    return replace(track, alarm=alarm, alarms=track.alarms + 1)


def _gain(what: What, bits: float, reference: float, settings: DriftSettings) -> float:
    rise = bits / max(reference, 1e-9) - 1
    return gain(rise if math.isfinite(rise) else math.inf, settings.slack, _SPREAD[what])


def _mean(bits: Sequence[float]) -> float | None:
    return sum(bits) / len(bits) if bits else None
