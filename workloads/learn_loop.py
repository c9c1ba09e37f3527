"""The loop that learns while the mesh serves: rounds over what is new in the stream, one at a time.

1. gathering    enough of a domain has come: the round's samples are fixed, and experts chosen for them
2. training     the job runs, and waits while the server has much to do
3. judging      held-out text decides; what passes is published
4. published    hosts load it beside what serves
5. staged       a share of requests gets it
6. on trial     the controller promotes it or rolls it back

Every line is a step of `Loop.look`, which first reads what was written down and last writes what is next: killed
anywhere, the step is done again. What a step does is the work's own; see `cluster.learning.journal`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from cluster.config_learning import LearningConfig
from cluster.errors import LearningError, VersionError
from cluster.learning.backlog import Counts, next_domain
from cluster.learning.journal import ACCEPTED, Journal, LoopState, Phase, Round, at, begun, ended, known
from cluster.learning.records import Record
from cluster.learning.reservoir import Reservoir
from cluster.learning.stream import Stream
from workloads.learn_judging import Judgement
from workloads.learn_serving import Trialled

# Servers that began anew in the middle of one trial, after which it is given up.
_ATTEMPTS: Final = 3


class Work(Protocol):
    """What is done in the phases of a round; each may be done again."""

    @property
    def serves(self) -> bool:
        """Whether there is a server that can try versions out."""

    def serving(self) -> str:
        """Digest of the version that serves."""

    def samples(self, domain: str, after: int, upto: int, seen: Reservoir) -> Sequence[Record]:
        """What may be learnt of a domain, from shards behind one up to another."""

    def lacks(self, domain: str, old: Sequence[str], upto: int) -> str | None:
        """Why a round of a domain could not be judged; None if it could."""

    def gather(self, now: Round, old: Mapping[str, Sequence[Record]], new: Sequence[Record]) -> int:
        """Choose experts and put the job down; how many. LearningError if the samples are of no use."""

    def train(self, now: Round) -> int:
        """Do the job; its steps. LearningError if it can't be done."""

    def judge(self, now: Round, old: Sequence[str]) -> Judgement:
        """What the gate says, by domains that are replayed, the round's own perhaps; what passes is published."""

    def stage(self, now: Round) -> None:
        """Have the hosts load it. VersionError if they can't."""

    def try_out(self, now: Round) -> bool:
        """Give it to a share of requests; False while another one is on trial. VersionError if that can't be."""

    def trialled(self, now: Round) -> tuple[Trialled, str]:
        """What has become of it on trial, and why."""

    def discard(self, now: Round) -> None:
        """Take away what is not needed any more."""


class Watch(Protocol):
    """Looks whether what serves gets worse."""

    @property
    def urgent(self) -> frozenset[str]:
        """Domains of which a round is to begin with as few samples as there are."""

    def look(self, loop: LoopState) -> bool:
        """Look, if it is time; whether it was."""


class Loop:
    """Used by one thread; `look` does one step at a time."""

    def __init__(
        self,
        journal: Journal,
        stream: Stream,
        work: Work,
        settings: LearningConfig,
        *,
        drift: Watch | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Reads how far the journal is. LearningError if that is damaged."""
        self._drift = drift
        self._journal, self._stream, self._work, self._settings = journal, stream, work, settings
        self._seed, self._clock = seed, clock
        self._counts = Counts(settings.holdout)
        self.state: LoopState = journal.load()
        self.waits_for: dict[str, str] = {}
        """Domain → why there is no round of it, though there are enough samples."""

    @property
    def waiting(self) -> dict[str, int]:
        """Domain → samples that no round has used, of the shards that were read."""
        return {domain: found.samples for domain, found in self._counts.waiting(self.state.offsets).items()}

    def look(self) -> bool:
        """Do one step; False if there is nothing to be done now."""
        # While two versions answer nobody knows which of them is asked.
        on_trial = self.state.now is not None and self.state.now.phase == "on trial"
        if self._drift is not None and not on_trial and self._drift.look(self.state):
            return True
        if self.state.now is not None:
            return self._go_on(self.state.now)
        self._counts.read(
            (number, self._stream.read(number))
            for number in self._stream.numbers()
            if number > self._counts.last
        )
        return self._take_known() or self._begin()

    def _begin(self) -> bool:
        """A round of the domain that waits longest, of those that can be judged."""
        settings, upto = self._settings, self._counts.last
        old = tuple(self._replayed().sizes)
        waiting = {
            domain: found
            for domain, found in self._counts.waiting(self.state.offsets).items()
            if domain not in settings.known
        }
        self.waits_for = {}
        while True:
            urgent = self._drift.urgent if self._drift is not None else frozenset()
            domain = next_domain(
                waiting, least=settings.least, age_s=settings.age, now=self._clock(), urgent=urgent
            )
            if domain is None:
                return False
            lacks = self._work.lacks(domain, [name for name in old if name != domain], upto)
            if lacks is None:
                break
            self.waits_for[domain] = lacks
            del waiting[domain]
        state = begun(
            self.state,
            domain,
            upto,
            parent=self._work.serving(),
            seed=self._seed,
            parts=settings.holdout_parts,
            now=self._clock(),
        )
        return self._save(state)

    def _take_known(self) -> bool:
        """What the model knew before is replayed, and no round's."""
        waiting = self._counts.waiting(self.state.offsets)
        for domain in self._settings.known:
            if domain in waiting:
                reservoir = self._replayed()
                upto = self._counts.last
                reservoir.add(self._work.samples(domain, self.state.offset(domain), upto, reservoir))
                return self._save(known(self.state, domain, upto, self._journal.keep(reservoir)))
        return False

    def _go_on(self, now: Round) -> bool:
        work, reservoir = self._work, self._replayed()
        old = {name: records for name, records in reservoir.kept.items() if name != now.domain}
        if now.phase == "gathering":
            new = work.samples(now.domain, now.after, now.upto, reservoir)
            try:
                count = work.gather(now, old, new)
            except LearningError as error:
                return self._end("refused", error.message)
            return self._save(at(self.state, "training", samples=len(new), experts=count))
        if now.phase == "training":
            try:
                steps = work.train(now)
            except LearningError as error:
                return self._end("refused", error.message)
            return self._save(at(self.state, "judging", steps=steps))
        if now.phase == "judging":
            try:
                found = work.judge(now, tuple(reservoir.kept))
            except LearningError as error:
                return self._end("refused", error.message)
            return self._judged(found)
        if now.phase == "published":
            return self._published(now)
        if now.phase == "staged":
            return self._staged(now)
        return self._on_trial(now)

    def _judged(self, found: Judgement) -> bool:
        metrics = dict(found.verdict.metrics)
        # The reasons of one that ends here are in the journal with the numbers that they rest on.
        if not found.verdict.passed:
            return self._end("refused", *found.verdict.reasons, metrics=metrics, share=found.trained_share)
        return self._save(
            at(
                self.state,
                "published",
                manifest=found.manifest,
                metrics=metrics,
                trained_share=found.trained_share,
            )
        )

    def _published(self, now: Round) -> bool:
        if not self._work.serves:
            return self._end("published", "there is no server to try it out")
        if now.attempts >= _ATTEMPTS:
            return self._end("rolled back", f"the server began anew in each of {_ATTEMPTS} trials")
        if self._changed(now):
            return self._end("superseded", "another version serves by now")
        try:
            self._work.stage(now)
        except VersionError as error:
            return self._end("rolled back", error.message)
        return self._save(at(self.state, "staged", attempts=now.attempts + 1))

    def _staged(self, now: Round) -> bool:
        what, why = self._work.trialled(now) if self._work.serves else ("gone", "")
        # What was killed here may have begun the trial.
        if what in ("promoted", "rolled back"):
            return self._end(what, why)
        if what == "waiting":
            return self._save(at(self.state, "on trial"))
        if not self._work.serves:
            return self._save(at(self.state, "published"))
        if self._changed(now):
            return self._end("superseded", "another version serves by now")
        try:
            if not self._work.try_out(now):
                return False
        except VersionError as error:
            if "is not loaded" in error.message:
                return self._save(at(self.state, "published"))
            return self._end("rolled back", error.message)
        return self._save(at(self.state, "on trial"))

    def _on_trial(self, now: Round) -> bool:
        what, why = self._work.trialled(now) if self._work.serves else ("gone", "")
        if what == "waiting":
            return False
        if what == "gone":
            return self._save(at(self.state, "published"))
        return self._end(what, why)

    def _changed(self, now: Round) -> bool:
        return self._work.serving() not in (now.parent, now.manifest)

    def _end(
        self,
        phase: Phase,
        *reasons: str,
        metrics: Mapping[str, float] | None = None,
        share: float | None = None,
    ) -> bool:
        now = self.state.now
        assert now is not None
        digest = ""
        if phase in ACCEPTED:
            reservoir = self._replayed()
            reservoir.add(self._work.samples(now.domain, now.after, now.upto, reservoir))
            digest = self._journal.keep(reservoir)
        state = ended(
            self.state,
            phase,
            self._clock(),
            reasons=tuple(reason for reason in reasons if reason),
            reservoir=digest,
            metrics=metrics,
            trained_share=share,
        )
        self._save(state)
        self._work.discard(now)
        return True

    def _save(self, state: LoopState) -> bool:
        self._journal.save(state)
        self.state = state
        return True

    def _replayed(self) -> Reservoir:
        return self._journal.replayed(self.state, self._settings.reservoir, self._seed)
