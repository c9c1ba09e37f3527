"""A plan in words: every expert that moves, and what it gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.holdings import Holders


@dataclass(frozen=True, slots=True)
class Move:
    """One expert that a host is to load."""

    layer: int
    expert: int
    to: str
    instead_of: str
    """The host that gives it up; "" for a copy more."""
    gain_s: float
    """What the layer's slowest host would take longer without this move, seconds a step."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement that may follow, and what speaks for it."""

    experts: Mapping[int, tuple[tuple[str, ...], ...]]
    seconds_now: float
    """Predicted time of a step's experts: the slowest host of each layer, added up."""
    seconds_then: float
    loads: int
    """Experts that hosts must load."""
    drops: int
    moves: tuple[Move, ...]
    """Only if they were asked for."""
    verdict: str
    """Why it is made, or why not."""
    worthwhile: bool

    @property
    def gain(self) -> float:
        """Share of the time that it saves."""
        return 1 - self.seconds_then / self.seconds_now if self.seconds_now > 0 else 0.0


def new_and_old(before: Holders, after: Holders) -> tuple[int, int]:
    """How many (layer, expert, host) only `after` has, and how many only `before` has."""
    loads = drops = 0
    for layer, rows in after.items():
        for expert, hosts in enumerate(rows):
            held = set(before[layer][expert]) if layer in before else set()
            loads += len(set(hosts) - held)
            drops += len(held - set(hosts))
    return loads, drops


def pairs(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """(host that loads the expert, host that gives it up or "")."""
    loads = [host for host in after if host not in before]
    drops = [host for host in before if host not in after]
    return [(host, drops[number] if number < len(drops) else "") for number, host in enumerate(loads)]
