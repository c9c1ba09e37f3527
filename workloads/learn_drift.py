"""Looks whether what serves gets worse, between the steps of the loop; see `cluster.learning.drift`.

A look is whole or was none: what it found is one document beside the journal, written in one go at its end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog
from pydantic import TypeAdapter

from cluster.config_learning import LearningConfig
from cluster.errors import ExpertmeshError
from cluster.learning.documents import read_document
from cluster.learning.drift import DriftSettings, DriftState, Track, alarmed, answered, looked
from cluster.learning.journal import LoopState
from cluster.learning.records import Record
from cluster.learning.split import fingerprint, holdout_of
from cluster.learning.stream import Stream
from cluster.versions.files import Files
from workloads.learn_readers import Reader

log = structlog.get_logger()

_NAME: Final = "drift"
_FORM: Final = TypeAdapter(DriftState)
_MARK: Final = 16
# Held-out texts of a domain, fewer than a track remembers, so that none is taken for new.
_MOST: Final = 1000
# Characters: of less nothing can be said.
_SHORTEST: Final = 32

Held = Callable[[int], Mapping[str, Sequence[Record]]]
"""Number of a shard → domain → texts that are held out up to there."""


def load(files: Files) -> DriftState:
    """What was written last. LearningError if it is damaged, or of another form."""
    hint = "take it away: what is held against what begins anew"
    return read_document(files, _NAME, _FORM, DriftState(), hint)


@dataclass(frozen=True, slots=True)
class _ToRead:
    domain: str
    marks: tuple[str, ...]
    texts: tuple[str, ...]
    """Held-out ones, by their marks, then live ones."""


class DriftWatch:
    """Used by the loop's thread."""

    def __init__(
        self,
        files: Files,
        stream: Stream,
        held: Held,
        serving: Callable[[], str],
        reader: Reader,
        settings: LearningConfig,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """LearningError if what was written down is damaged."""
        self._files, self._stream, self._held, self._serving = files, stream, held, serving
        self._reader, self._settings, self._clock = reader, settings, clock
        wanted = settings.drift
        self._drift = DriftSettings(wanted.slack, wanted.false_alarms, wanted.warm)
        self.state = load(files)

    @property
    def urgent(self) -> frozenset[str]:
        """Domains of which a round is to begin now."""
        return alarmed(self.state) if self._settings.drift.update else frozenset()

    def look(self, loop: LoopState) -> bool:
        """Look, if it is time; whether it was."""
        now, every = self._clock(), self._settings.drift.every
        self._save(answered(self.state, loop.past))
        if every is None or now - self.state.at < every:
            return False
        state = replace(self.state, looks=self.state.looks + 1, at=now, trouble="")
        upto = self._stream.last()
        try:
            tracks = self._read(state, self._serving(), upto, now)
        except ExpertmeshError as error:
            if error.message != self.state.trouble:
                log.warning("drift can't be measured", reason=error.message)
            self._save(replace(state, trouble=error.message))
            return True
        for domain, track in tracks.items():
            before = state.tracks.get(domain, Track())
            if track.alarm is not None and track.alarms > before.alarms:
                log.warning("what serves gets worse", domain=domain, reason=track.alarm.said)
        self._save(replace(state, tracks={**state.tracks, **tracks}, upto=max(upto, state.upto)))
        return True

    def _read(self, state: DriftState, manifest: str, upto: int, now: float) -> dict[str, Track]:
        found = self._to_read(state, manifest, upto)
        # In one go: who opens a version for it does so once.
        bits = list(self._reader.read(manifest, [text for one in found for text in one.texts]))
        tracks = {}
        for one in found:
            mine, bits = bits[: len(one.texts)], bits[len(one.texts) :]
            held = [(mark, b) for mark, b in zip(one.marks, mine, strict=False) if b is not None]
            live = [b for b in mine[len(one.marks) :] if b is not None]
            if held or live:
                track = state.tracks.get(one.domain, Track())
                tracks[one.domain] = looked(track, manifest, held, live, self._drift, now)
        return tracks

    def _to_read(self, state: DriftState, manifest: str, upto: int) -> list[_ToRead]:
        settings = self._settings
        held, live = self._held(upto), self._arrived(state, upto)
        found = []
        for domain in sorted({*held, *live}):
            by_mark = {fingerprint(record.text)[:_MARK]: record.text for record in held.get(domain, ())}
            by_mark = {mark: by_mark[mark] for mark in sorted(by_mark)[:_MOST]}
            track = state.tracks.get(domain, Track())
            parts = settings.holdout_parts

            def turn(mark: str, texts: Mapping[str, str] = by_mark, parts: int = parts) -> int:
                return ((holdout_of(texts[mark], settings.holdout, parts) or 0) - state.looks) % parts

            marks = sorted(track.unread(manifest, list(by_mark)), key=turn)[: settings.drift.texts]
            texts = [by_mark[mark] for mark in marks]
            found.append(_ToRead(domain, tuple(marks), (*texts, *live.get(domain, ()))))
        return found

    def _arrived(self, state: DriftState, upto: int) -> dict[str, list[str]]:
        """Domain → some of the texts that came in since the last look, by lot."""
        dice, most = random.Random(state.looks), self._settings.drift.texts
        found: dict[str, list[str]] = {}
        seen: dict[str, int] = {}
        for number, records in self._stream.after(state.upto):
            for record in records if number <= upto else ():
                text = record.prompt if record.kind == "request" else record.text
                if record.kind == "feedback" or len(text) < _SHORTEST:
                    continue
                kept = found.setdefault(record.domain, [])
                seen[record.domain] = count = seen.get(record.domain, 0) + 1
                if len(kept) < most:
                    kept.append(text)
                elif (place := dice.randrange(count)) < most:
                    kept[place] = text
        return found

    def _save(self, state: DriftState) -> None:
        if state != self.state:
            self._files.renew(_NAME, _FORM.dump_json(state))
            self.state = state
