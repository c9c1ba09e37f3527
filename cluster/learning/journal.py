"""What a loop that learns must not lose: how far in the stream it is, what it replays, and the round that goes on.

    gathering → training → judging → published → staged → on trial → promoted | rolled back
         refused: by the gate, or since the samples were of no use
         superseded: somebody else changed what serves meanwhile; its samples wait for another round

All of it is one small document, of which each change is a file with the next number (as aliases are moved, see
`cluster.versions.aliases`): of two loops on one journal the second to write is told, and stops. It is written before
each phase begins, so that whoever goes on after a crash does the phase again, from inputs that are written down, and
every phase may be done again. A round's end, the offset behind its samples and what is replayed from then on are one
change: no sample is lost, and none is used twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from cluster.errors import LearningError
from cluster.learning.reservoir import Reservoir
from cluster.versions.files import Files

Phase = Literal[
    "gathering",
    "training",
    "judging",
    "published",
    "staged",
    "on trial",
    "promoted",
    "rolled back",
    "refused",
    "superseded",
]
_NEXT: Final[Mapping[Phase, frozenset[Phase]]] = {
    "gathering": frozenset({"training"}),
    "training": frozenset({"judging"}),
    "judging": frozenset({"published"}),
    "published": frozenset({"staged"}),
    # A server that began anew has not loaded it any more.
    "staged": frozenset({"on trial", "published"}),
    "on trial": frozenset({"published"}),
}
_ENDS: Final[Mapping[Phase, frozenset[Phase]]] = {
    "gathering": frozenset({"refused"}),
    "training": frozenset({"refused"}),
    "judging": frozenset({"refused"}),
    # With nobody to serve it, it ends there.
    "published": frozenset({"published", "superseded", "rolled back"}),
    "staged": frozenset({"superseded", "promoted", "rolled back"}),
    "on trial": frozenset({"promoted", "rolled back"}),
}
ACCEPTED: Final[frozenset[Phase]] = frozenset({"published", "promoted"})
"""Ends after which the samples are known."""
_ENTRIES: Final = "journal"
_RESERVOIRS: Final = "reservoirs"
_PAST: Final = 50
# Whoever reads the latest must find it, even if some are written meanwhile.
_KEPT: Final = 8


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt to learn something."""

    number: int
    domain: str
    after: int
    """Number of the shard behind which its samples begin."""
    upto: int
    """Number of the last shard with samples of it."""
    parent: str
    """Digest of the version that served when it began."""
    seed: int
    part: int
    """Of the holdout, that judges."""
    began: float
    """Seconds since 1970."""
    phase: Phase = "gathering"
    ended: float = 0.0
    samples: int = 0
    """That were left of the filters."""
    steps: int = 0
    experts: int = 0
    """That were trained."""
    trained_share: float = 0.0
    """Of the model's weights."""
    manifest: str = ""
    """Digest of what was learnt, once it is published."""
    attempts: int = 0
    """To try it out: a server may have begun anew meanwhile."""
    reasons: tuple[str, ...] = ()
    """Why it ended so."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the gate measured."""

    @property
    def name(self) -> str:
        """Of its training."""
        return f"round-{self.number:06}"


@dataclass(frozen=True, slots=True)
class LoopState:
    """All that a loop knows."""

    offsets: Mapping[str, int] = field(default_factory=dict)
    """Domain → number of the shard up to which its samples were used."""
    reservoir: str = ""
    """Digest of what is replayed; "" before anything is."""
    rounds: int = 0
    """That have begun."""
    now: Round | None = None
    """The round that goes on."""
    past: tuple[Round, ...] = ()
    """The last ones, the latest last."""

    def offset(self, domain: str) -> int:
        """Up to which shard its samples were used."""
        return self.offsets.get(domain, 0)


def begun(
    state: LoopState, domain: str, upto: int, *, parent: str, seed: int, parts: int, now: float
) -> LoopState:
    """With a round of a domain's samples up to a shard. ValueError while another goes on, or there is nothing new."""
    if state.now is not None:
        raise ValueError(f"round {state.now.number} goes on")
    if upto <= state.offset(domain):
        raise ValueError(f"samples of {domain} were used up to shard {state.offset(domain)}")
    number = state.rounds + 1
    made = Round(number, domain, state.offset(domain), upto, parent, seed + number, (number - 1) % parts, now)
    return replace(state, rounds=number, now=made)


def at(state: LoopState, phase: Phase, **changes: object) -> LoopState:
    """With the round in its next phase. ValueError if that can't follow."""
    if state.now is None or phase not in _NEXT.get(state.now.phase, ()):
        raise ValueError(f"{phase} does not follow {state.now and state.now.phase}")
    return replace(state, now=replace(state.now, phase=phase, **changes))  # type: ignore[arg-type]


def ended(
    state: LoopState,
    phase: Phase,
    now: float,
    *,
    reasons: tuple[str, ...] = (),
    reservoir: str = "",
    metrics: Mapping[str, float] | None = None,
    trained_share: float | None = None,
) -> LoopState:
    """Without the round, which ended so; its samples are used, unless it was superseded.

    `reservoir`: what is replayed from now on, where the samples became known. ValueError if that can't follow.
    """
    if state.now is None or phase not in _ENDS.get(state.now.phase, ()):
        raise ValueError(f"{phase} does not end {state.now and state.now.phase}")
    done = replace(
        state.now,
        phase=phase,
        ended=now,
        reasons=reasons,
        metrics=state.now.metrics if metrics is None else metrics,
        trained_share=state.now.trained_share if trained_share is None else trained_share,
    )
    offsets = {**state.offsets} if phase == "superseded" else {**state.offsets, done.domain: done.upto}
    return replace(
        state,
        now=None,
        offsets=offsets,
        past=(*state.past, done)[-_PAST:],
        reservoir=reservoir or state.reservoir,
    )


def known(state: LoopState, domain: str, upto: int, reservoir: str) -> LoopState:
    """With a domain's samples known up to a shard, without a round: the model knew them before."""
    if state.now is not None and state.now.domain == domain:
        raise ValueError(f"round {state.now.number} goes on")
    return replace(state, offsets={**state.offsets, domain: upto}, reservoir=reservoir)


_STATE: Final = TypeAdapter(LoopState)


class Journal:
    """Where the state is kept; used by one loop, and read by anybody."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._number = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return self._files.url

    def load(self) -> LoopState:
        """What was written last; from here on this one writes. LearningError if it is damaged."""
        names = self._files.names(_ENTRIES)
        if not names:
            return LoopState()
        self._number = int(names[-1].rpartition("/")[2])
        try:
            return _STATE.validate_json(self._files.read(names[-1]))
        except ValidationError as error:
            raise LearningError(
                f"{self.url}/{names[-1]} makes no sense: {str(error).splitlines()[0]}",
                "take it away: the one before it is a step older",
            ) from error

    def save(self, state: LoopState) -> None:
        """Have this state. LearningError if somebody else has written since this one read or wrote."""
        self._files.check_exclusive()
        name = f"{_ENTRIES}/{self._number + 1:012}"
        data = _STATE.dump_json(state)
        if not self._files.create(name, data) and self._files.read(name) != data:
            raise LearningError(
                f"somebody else has written to {self.url} meanwhile",
                "see whether another `expertmesh learn serve` runs; begun again, this one goes on from there",
            )
        self._number += 1
        self._tidy(state)

    def replayed(self, state: LoopState, capacity: int, seed: int = 0) -> Reservoir:
        """What is replayed now; an empty reservoir before anything is. LearningError if it is damaged."""
        if not state.reservoir:
            return Reservoir(capacity, seed)
        name = f"{_RESERVOIRS}/{state.reservoir}"
        return Reservoir.from_bytes(self._files.read(name), f"{self.url}/{name}")

    def keep(self, reservoir: Reservoir) -> str:
        """Put a reservoir down, for the state that is saved next; its digest."""
        data = reservoir.to_bytes()
        digest = sha256(data).hexdigest()
        self._files.renew(f"{_RESERVOIRS}/{digest}", data)
        return digest

    def _tidy(self, state: LoopState) -> None:
        for name in self._files.names(_ENTRIES)[:-_KEPT]:
            self._files.remove(name)
        for name in self._files.names(_RESERVOIRS):
            if name != f"{_RESERVOIRS}/{state.reservoir}":
                self._files.remove(name)


def forget(files: Files, key: str) -> int:
    """Take all samples of one owner out of what is replayed; how many. A loop that runs stops, and may begin again."""
    journal = Journal(files)
    state = journal.load()
    if not state.reservoir:
        return 0
    reservoir = journal.replayed(state, 1)
    if count := reservoir.forget(key):
        journal.save(replace(state, reservoir=journal.keep(reservoir)))
    return count
