"""Shares of a node's GPUs, granted as Ray grants them: pure functions.

Ray gives a share out of one GPU: of those with enough left the one with least left, of equals the first (seen with
Ray 2.60). Which GPU that is cannot be chosen, and depends on the order in which shares are asked for. So whatever
is laid onto a node here finds its room in every order that may come up; what would need one is refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Final

GPU: Final = Decimal(1)


@dataclass(frozen=True, slots=True)
class NodeGpus:
    """The GPUs of one node, and who has a share of one.

    At the first start Ray is asked by the hosts, then by the engines. Who comes later finds both.
    """

    number: int
    engines: tuple[Decimal, ...] = ()
    hosts: tuple[Decimal, ...] = ()
    late: tuple[Decimal, ...] = ()
    """Hosts that came when engines and hosts had theirs."""

    def with_host(self, share: Decimal, *, late: bool = False) -> NodeGpus:
        """With one more host; `late` if the others and the engines have their shares already."""
        if late:
            return replace(self, late=(*self.late, share))
        return replace(self, hosts=(*self.hosts, share))

    @property
    def granted(self) -> bool:
        """Whether all get their shares, in whatever order hosts, then engines, then late hosts are started."""
        return always_granted(self.number, self.hosts, self.engines, self.late)

    @property
    def last_beside_engine(self) -> bool:
        """Whether the host that was added last shares its GPU with an engine, if all are started in turn."""
        where = turns(self.number, (*self.hosts, *self.engines, *self.late))
        first = len(self.hosts)
        last = len(where) - 1 if self.late else first - 1
        return where[last] in where[first : first + len(self.engines)]

    def __str__(self) -> str:
        parts = (("engines", self.engines), ("hosts", (*self.hosts, *self.late)))
        taken = [
            f"{who} take {' + '.join(f'{share:f}' for share in shares)}" for who, shares in parts if shares
        ]
        gpus = "1 GPU" if self.number == 1 else f"{self.number} GPUs"
        return f"{gpus}, of which {' and '.join(taken)}" if taken else gpus


def turns(gpus: int, shares: Sequence[Decimal]) -> list[int]:
    """The GPU that each gets, if they are asked for one after the other. ValueError if one finds no room."""
    free = [GPU] * gpus
    where = []
    for share in shares:
        fitting = [gpu for gpu in range(gpus) if free[gpu] >= share]
        if not fitting:
            raise ValueError(f"no GPU has {share} left: {free}")
        gpu = min(fitting, key=free.__getitem__)
        free[gpu] -= share
        where.append(gpu)
    return where


def always_granted(gpus: int, *rounds: Sequence[Decimal]) -> bool:
    """Whether all shares find room, in whatever order those of one round are asked for, round after round."""
    return _always_granted(gpus, tuple(tuple(sorted(shares)) for shares in rounds))


# Nodes are often alike, and a host is tried on all of them: with four sizes of shares on eight GPUs one look takes
# 0.4 seconds.
@lru_cache(maxsize=1024)
def _always_granted(gpus: int, rounds: tuple[tuple[Decimal, ...], ...]) -> bool:
    # What may be free on the GPUs, ascending: which one it is does not matter.
    possible = {(GPU,) * gpus}
    for shares in rounds:
        states = {(free, shares) for free in possible}
        for _ in shares:
            following = set()
            for free, waiting in states:
                for index, share in enumerate(waiting):
                    if index and waiting[index - 1] == share:
                        continue
                    left = _taken(free, share)
                    if left is None:
                        return False
                    following.add((left, waiting[:index] + waiting[index + 1 :]))
            states = following
        possible = {free for free, _ in states}
    return True


def _taken(free: tuple[Decimal, ...], share: Decimal) -> tuple[Decimal, ...] | None:
    """What is free, ascending, once a share was granted; None if it can't be."""
    index = bisect_left(free, share)
    if index == len(free):
        return None
    return tuple(sorted((*free[:index], free[index] - share, *free[index + 1 :])))
