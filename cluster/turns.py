"""Which of its hosts is asked first for each expert of a layer, so that all hosts get their share of the work."""

from __future__ import annotations

from collections.abc import Sequence


def first_asked(holders: Sequence[Sequence[int]], weights: Sequence[int]) -> list[int]:
    """Per expert one of its ``holders``, each host as often as its weight says, as nearly as can be.

    Least is the sum of (times asked)² / weight. Experts choose one after the other, then chains of them pass
    the turn on for as long as that makes the sum less; where no chain does, none is less (Harvey, Ladner,
    Lovász and Tamir: semi-matchings, 2006).
    """
    asked, load = [-1] * len(holders), [0] * len(weights)
    # Those with few holders leave the least choice, so they choose first.
    for expert in sorted(range(len(holders)), key=lambda expert: len(holders[expert])):
        host = min(holders[expert], key=lambda h: (2 * load[h] + 1) / max(1, weights[h]))
        asked[expert] = host
        load[host] += 1
    held: list[list[int]] = [[] for _ in weights]
    for expert, hosts in enumerate(holders):
        for host in hosts:
            held[host].append(expert)
    while any([_relieve(host, asked, load, held, weights) for host in range(len(weights))]):
        pass
    return asked


def _relieve(
    taker: int, asked: list[int], load: list[int], held: Sequence[Sequence[int]], weights: Sequence[int]
) -> bool:
    """Let ``taker`` take one turn more, at the end of a chain from the host with most work; whether it did."""
    passes: dict[int, tuple[int, int]] = {}
    """Host → an expert that it is asked for, and the host that it can pass it on to."""
    reached = [taker]
    for host in reached:
        for expert in held[host]:
            giver = asked[expert]
            if giver != taker and giver not in passes:
                passes[giver] = (expert, host)
                reached.append(giver)
    # In whole numbers: rounding must not let two hosts pass a turn to and fro.
    gains = {
        giver: (2 * load[giver] - 1) * max(1, weights[taker]) - (2 * load[taker] + 1) * max(1, weights[giver])
        for giver in passes
    }
    giver = max(gains, key=lambda h: gains[h] / max(1, weights[h]), default=taker)
    if gains.get(giver, 0) <= 0:
        return False
    load[giver] -= 1
    load[taker] += 1
    while giver != taker:
        expert, giver = passes[giver]
        asked[expert] = giver
    return True
