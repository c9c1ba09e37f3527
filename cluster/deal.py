"""Deal copies of things to parties, none of which may have a thing twice: exact, in integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from operator import le


def most_held(copies: Iterable[int], parties: int) -> list[int]:
    """The most that any 0, 1, 2, ... ``parties`` hold together of things with so many ``copies``.

    Totals that add up to all copies can be dealt, no thing twice to a party, if no k of them together exceed
    the k-th of these, and only then (Gale and Ryser, 1957).
    """
    numbers = Counter(copies)
    return [sum(min(copy, k) * times for copy, times in numbers.items()) for k in range(parties + 1)]


def apportion_copies(copies: Sequence[int], weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Like `apportion` for things of which no party may hold two copies; less in all where caps say so.

    Largest next quotient first (Sainte-Laguë). What any k parties may hold together is a submodular bound,
    under which a greedy choice is exact: a party that is refused once would be refused ever after.
    """
    bound, left = most_held(copies, len(weights)), sum(copies)
    shares = [0] * len(weights)
    queue = [(1 / max(1, weight), party) for party, weight in enumerate(weights)]
    heapify(queue)
    while queue and left:
        _, party = heappop(queue)
        shares[party] += 1
        if shares[party] > caps[party] or not _within(shares, bound):
            shares[party] -= 1
            continue
        left -= 1
        heappush(queue, ((2 * shares[party] + 1) / max(1, weights[party]), party))
    return shares


def deal(
    rounds: Sequence[Sequence[int]], totals: Sequence[int], groups: Sequence[int]
) -> list[list[tuple[int, ...]]]:
    """Who gets the copies of each thing: ``rounds[r][i]`` distinct parties, ascending, for thing i of round r.

    Every party gets its total, of every round in proportion as far as can be, and copies go to parties of
    distinct ``groups`` where that costs nothing. ``totals`` must be :func:`apportion_copies`' of all things
    (ValueError if they can't be dealt).
    """
    left, units = list(totals), sum(totals)
    bound = most_held((copies for things in rounds for copies in things), len(left))
    if units != bound[-1] or not _within(left, bound):
        raise ValueError(f"totals {totals} cannot be dealt")
    dealt: list[list[tuple[int, ...]]] = [[()] * len(things) for things in rounds]
    # Rounds and things with many copies leave the least choice, so they come first.
    for number in sorted(range(len(rounds)), key=lambda r: -max(rounds[r], default=0)):
        things = rounds[number]
        # In units of 1 / units, to stay exact.
        quotas, size = [total * sum(things) for total in left], units
        for thing in sorted(range(len(things)), key=lambda i: -things[i]):
            copies = things[thing]
            bound = [most - min(copies, k) for k, most in enumerate(bound)]
            chosen = _choose(copies, _by_wish(quotas, groups), left, bound)
            for party in chosen:
                left[party] -= 1
                quotas[party] -= size
            units -= copies
            dealt[number][thing] = tuple(sorted(chosen))
    return dealt


def _by_wish(quotas: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Parties by how much they still lack of this round, the first of every group before the second ones."""
    order = sorted(range(len(quotas)), key=lambda party: -quotas[party])
    before = Counter[int]()
    rank = {}
    for party in order:
        rank[party] = (quotas[party] <= 0, before[groups[party]])
        before[groups[party]] += 1
    return sorted(order, key=rank.__getitem__)


def _choose(copies: int, order: Sequence[int], left: Sequence[int], bound: Sequence[int]) -> Sequence[int]:
    """The first parties in ``order`` that may have a copy so that the rest can still be dealt."""

    def leaves_enough(chosen: Sequence[int]) -> bool:
        after = [total - (party in chosen) for party, total in enumerate(left)]
        return min(after) >= 0 and _within(after, bound)

    if leaves_enough(order[:copies]):
        return order[:copies]
    chosen: list[int] = []
    for party in order:
        # Possible if it is with those that have most left as the others.
        others = sorted({*order} - {*chosen, party}, key=lambda p: -left[p])
        if leaves_enough([*chosen, party, *others[: copies - len(chosen) - 1]]):
            chosen.append(party)
        if len(chosen) == copies:
            break
    return chosen


def _within(shares: Sequence[int], bound: Sequence[int]) -> bool:
    return all(map(le, accumulate(sorted(shares, reverse=True)), bound[1:]))
