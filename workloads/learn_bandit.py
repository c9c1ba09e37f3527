"""Versions that share requests by what they earn: begun by hand, looked after by the loop, and ended by a promotion.

What is under way is one document beside the loop's journal. It is written before the server is told, and the server is
told of all shares each time, so that whoever goes on after a crash or a restart does the same again. What was earned
is read from the stream anew at each look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog
from pydantic import TypeAdapter

from cluster.config_learning import BanditConfig
from cluster.errors import LearningError, VersionError
from cluster.learning.bandit import BanditReport, BanditSettings, check, judged, rewarded, shares
from cluster.learning.documents import read_document
from cluster.learning.off_policy import Logged
from cluster.learning.stream import Stream
from cluster.version_changes import VersionsStatus
from cluster.versions.files import Files

log = structlog.get_logger()

_NAME: Final = "bandit"


@dataclass(frozen=True, slots=True)
class BanditState:
    """What is under way, or what became of the last one."""

    number: int = 0
    """Of those that ever began."""
    arms: tuple[str, ...] = ()
    """Versions; the first one served when it began."""
    floor: float = 0.1
    after: int = 0
    """Number of the shard behind which its requests are."""
    began: float = 0.0
    """Seconds since 1970."""
    looks: int = 0
    at: float = 0.0
    """When the last look was."""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Context → version → probability."""
    requests: int = 0
    """Of which it is known what they earned."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Version → what the gate said of it at the last look."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What that rests on."""
    promoted: str = ""
    ended: str = ""
    """Why; "" while it is under way, or none ever was."""
    form: int = 1
    """Of this document."""

    @property
    def under_way(self) -> bool:
        """Whether requests are to be shared out."""
        return bool(self.arms) and not self.ended


_FORM: Final = TypeAdapter(BanditState)


class Server(Protocol):
    """See `workloads.learn_serving.Serving`."""

    def status(self) -> VersionsStatus: ...
    def share_out(self, shares: Mapping[str, Mapping[str, float]]) -> None: ...
    def promote(self, manifest: str, reason: str) -> None: ...


class Bandit:
    """Of one server and one stream. What is under way may have been begun, or ended, by another process."""

    def __init__(
        self,
        files: Files,
        stream: Stream,
        config: BanditConfig,
        server: Server | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files, self._stream, self._config = files, stream, config
        self._server, self._clock = server, clock

    def state(self) -> BanditState:
        """What was written last. LearningError if it is damaged, or of another form."""
        hint = "take it away, and promote the version that is to serve"
        return read_document(self._files, _NAME, _FORM, BanditState(), hint)

    def begin(self, others: Sequence[str]) -> BanditState:
        """Share requests out among the version that serves and some others, evenly at first.

        LearningError if another one is under way, or these can't share; VersionError if they are not loaded.
        """
        state, server = self.state(), self._asked()
        if state.under_way:
            raise LearningError(
                f"{len(state.arms)} versions share requests already",
                "end that with `expertmesh learn bandit --end` first",
            )
        arms = (server.status().serving, *others)
        check(arms, self._config.floor)
        made = BanditState(
            number=state.number + 1,
            arms=arms,
            floor=self._config.floor,
            after=self._stream.last(),
            began=self._clock(),
            at=self._clock(),
        )
        made = replace(made, shares=shares([], arms, self._settings(made)))
        # What can't be shared out is told, and was never begun.
        server.share_out(made.shares)
        return self._save(made)

    def look(self) -> bool:
        """Look, if one is under way and it is time; whether it was."""
        state, every = self.state(), self._config.every
        if not state.under_way or every is None or self._clock() - state.at < every:
            return False
        self.update()
        return True

    def update(self) -> BanditState:
        """Share requests out by all that is known by now, or promote what passes."""
        state, server = self.state(), self._asked()
        if not state.under_way:
            raise _nothing()
        status = server.status()
        if status.serving != state.arms[0]:
            return self._end(state, _became(status.serving, state.arms), status.serving)
        before, logs, settings = state, self.logs(state), self._settings(state)
        state = replace(
            state,
            looks=state.looks + 1,
            at=self._clock(),
            requests=len(logs),
            shares=shares(logs, state.arms, settings),
        )
        if logs:
            report = judged(logs, state.arms, state.arms[0], settings)
            state = replace(state, reasons=report.reasons, metrics=metrics(report))
        now = self.state()
        if now != before:
            # Somebody else has looked, or ended it, while this one was reckoning.
            return now
        self._save(state)
        if logs and report.promote and self._config.promote:
            return self._promote(state, server, report)
        try:
            server.share_out(state.shares)
        except VersionError as error:
            log.warning("versions share requests no more", reason=error.message)
            return self._end(state, error.message, "")
        return state

    def _promote(self, state: BanditState, server: Server, report: BanditReport) -> BanditState:
        reason = f"of {len(state.arms)} versions: {report.reasons[report.promote]}"
        try:
            server.promote(report.promote, reason)
        except VersionError as error:
            log.warning("bandit's choice not promoted", reason=error.message)
            return state
        log.info("bandit promoted", manifest=report.promote[:12], reason=reason)
        return self._end(state, f"promoted: {reason}", report.promote)

    def end(self) -> BanditState:
        """Give all new requests the version that serves. LearningError if none is under way."""
        state = self.state()
        if not state.under_way:
            raise _nothing()
        if self._server is not None:
            self._server.share_out({})
        return self._end(state, "by hand", "")

    def logs(self, state: BanditState) -> list[Logged]:
        """What its requests earned."""
        records = (record for _, shard in self._stream.after(state.after) for record in shard)
        return rewarded(records, state.arms)

    def report(self, state: BanditState) -> BanditReport | None:
        """What is known now; None before anything is."""
        logs = self.logs(state) if state.arms else []
        return judged(logs, state.arms, state.arms[0], self._settings(state)) if logs else None

    def _settings(self, state: BanditState) -> BanditSettings:
        wanted = self._config
        return BanditSettings(state.floor, wanted.alpha, wanted.level, wanted.fewest, state.looks)

    def _end(self, state: BanditState, why: str, promoted: str) -> BanditState:
        return self._save(
            replace(state, ended=why, promoted=promoted if promoted in state.arms else "", shares={})
        )

    def _asked(self) -> Server:
        if self._server is None:
            raise LearningError("there is no server whose requests could be shared out", "start one first")
        return self._server

    def _save(self, state: BanditState) -> BanditState:
        self._files.renew(_NAME, _FORM.dump_json(state))
        return state


def metrics(report: BanditReport) -> dict[str, float]:
    """What a verdict rests on, by name."""
    found: dict[str, float] = {}
    for one in report.arms:
        name = one.manifest[:12]
        found |= {
            f"pulls.{name}": float(one.pulls),
            f"dr.{name}": one.dr.mean,
            f"gain.{name}": one.gain.mean,
            f"gain.{name}.low": one.gain.low,
            f"evidence.{name}": one.evidence,
        }
    return found


def _nothing() -> LearningError:
    return LearningError(
        "no versions share requests", "begin with `expertmesh learn bandit --arm VERSION`, of loaded ones"
    )


def _became(serving: str, arms: Sequence[str]) -> str:
    if serving in arms:
        return f"{serving[:12]} was promoted"
    return f"another version serves by now, {serving[:12]}"
