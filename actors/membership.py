"""Which hosts are asked: a state machine over what the dispatcher sees of them. No sockets, no clock of its own.

    ASKED      answers in time
    SUSPECTED  owes an answer; is asked only for what nobody else holds
    OUT        gone, or late too often: a probe lets it back

A host that was let back and is late again soon must show more good probes the next time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

# So many late answers put a host out, each at most so long after the one before: a slow host is late in every
# layer, one that had to wait for a core is not.
_STRIKES, _APART_S = 3, 1.0
# A suspected host that still owes its answer after this long is out: frozen, or cut off without a word.
FROZEN_S: Final = 0.25
# Good probes in a row before a host is let back; doubled each time that it is late again within _SOON_S.
_FIRST_STREAK, _LONGEST_STREAK, _SOON_S = 3, 48, 30.0


class State(Enum):
    """Of one host."""

    ASKED = "asked"
    SUSPECTED = "suspected"
    OUT = "out"


@dataclass(slots=True)
class _Member:
    state: State
    strikes: int = 0
    late_at: float = float("-inf")
    suspected_at: float = 0.0
    let_back_at: float = float("-inf")
    streak: int = _FIRST_STREAK
    reason: str = ""


class Membership:
    """The members by name. Times are seconds of any monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self.version = 0
        """Counts changes of state: what was derived from an older one is out of date."""

    def keep(self, names: Iterable[str]) -> None:
        """These are the members now; new ones are OUT until they are let in."""
        old = self._members
        self._members = {name: old.get(name) or _Member(State.OUT, reason="not connected") for name in names}
        self.version += 1

    def state(self, name: str) -> State:
        return self._members[name].state

    def named(self, state: State) -> list[str]:
        """Members in that state, in their order."""
        return [name for name, member in self._members.items() if member.state is state]

    def reason(self, name: str) -> str:
        """Why a member is out."""
        return self._members[name].reason

    def streak(self, name: str) -> int:
        """Good probes in a row that the member must show before it is let back."""
        return self._members[name].streak

    def late(self, name: str, now: float) -> None:
        """An answer is late."""
        member = self._members[name]
        member.strikes = member.strikes + 1 if now - member.late_at <= _APART_S else 1
        member.late_at = now
        if member.state is State.ASKED:
            member.suspected_at = now
            self._move(member, State.SUSPECTED)
        if member.strikes >= _STRIKES:
            self._eject(member, "late too often", now)

    def caught_up(self, name: str) -> None:
        """A suspected member has answered all that it owed."""
        member = self._members[name]
        if member.state is State.SUSPECTED:
            self._move(member, State.ASKED)

    def overdue(self, name: str, now: float) -> bool:
        """Whether a suspected member has owed its answer for too long; it is then out."""
        member = self._members[name]
        if member.state is State.SUSPECTED and now - member.suspected_at >= FROZEN_S:
            self._eject(member, "does not answer", now)
            return True
        return False

    def lost(self, name: str, reason: str) -> None:
        """The connection is gone."""
        member = self._members[name]
        member.reason = reason
        member.strikes = 0
        self._move(member, State.OUT)

    def let_in(self, name: str, now: float) -> None:
        """The member is connected and has shown that it answers."""
        member = self._members[name]
        member.strikes = 0
        member.let_back_at, member.reason = now, ""
        self._move(member, State.ASKED)

    def _eject(self, member: _Member, reason: str, now: float) -> None:
        soon = now - member.let_back_at < _SOON_S
        member.streak = min(2 * member.streak, _LONGEST_STREAK) if soon else _FIRST_STREAK
        member.reason = reason
        self._move(member, State.OUT)

    def _move(self, member: _Member, state: State) -> None:
        if member.state is not state:
            member.state = state
            self.version += 1
