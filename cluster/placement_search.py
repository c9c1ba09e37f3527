"""Where the replicas of one layer go: a local search that looks at many steps' loads at once.

A placement is judged by the time of the slowest host after the best split (`cluster.balance`), averaged over several
scenarios, so that what it is good at is not one average load but the loads that come. Hot experts' replicas then
link hosts to each other, and what one host has too much of flows on along these links: the long chain of Jordan and
Graves ("Principles on the benefits of manufacturing process flexibility", 1995), found by search.

Most moves are none: they are given up after the first scenarios in which they do harm. Arrays as in
`cluster.placement_moves`. Compiled by Numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cluster.balance import even, levels, pour, pour_these
from cluster.placement_moves import (
    ADD,
    REPLACE,
    SWAP,
    apart_enough,
    apply_move,
    may_hold,
    position,
    undo_move,
)
from cluster.placement_time import level_objective, objective

_SWEEPS = 4
_TOLERANCE = 1e-3
# Scenarios after which a move that does harm so far is given up.
_PATIENCE = 4
# Of the objective; nobody sees what could be gained beyond it.
_LEVEL = 5e-4


@njit(cache=True, nogil=True)
def search(
    touch, rows, fixed, per_touch, per_row, slots, least, domain, apart, pin, allowed,
    holders, copies, content, used, present, most_copies, price, tries, seed, path,
):  # fmt: skip
    """Improve a placement move by move; every accepted one is written to `path` [tries, 6].

    Args: touch and rows [S, E], present bool [H, E]: what hosts hold now, for every blob beyond which `price`
    (a share of the objective) must be gained; `most_copies` of all experts together. A row of `path` is kind, expert,
    its host, other expert, its host, and blobs that are to be loaded then. Returns (number of moves, objective before,
    objective after each move [tries]).
    """
    np.random.seed(seed)
    scenarios, experts = touch.shape
    hosts = len(slots)
    share = np.zeros((scenarios, experts, holders.shape[1]))
    level = np.zeros((scenarios, hosts))
    reached, ideal = np.zeros(scenarios), 0.0
    for s in range(scenarios):
        even(holders, copies, touch[s], rows[s], fixed, per_touch, per_row, share[s], level[s])
        pour(
            holders, copies, touch[s], rows[s], per_touch, per_row, share[s], level[s],
            0.1 * _TOLERANCE * level[s].max(), 50,
        )  # fmt: skip
        reached[s] = objective(level[s])
        ideal += level_objective(touch[s], rows[s], fixed, per_touch, per_row) / scenarios
    best = before = reached.mean()
    after = np.empty(tries)
    tolerance = _TOLERANCE * before
    price = price * before
    kept_share, kept_level, now = share.copy(), level.copy(), reached.copy()
    several = np.empty(experts, np.int32)
    number = _with_copies(copies, several)
    blobs = moves = held = 0
    for h in range(hosts):
        held += used[h]
        for k in range(used[h]):
            blobs += not present[h, content[h, k]]
    for _ in range(tries):
        if best <= ideal * (1.0 + _LEVEL):
            break
        s = np.random.randint(scenarios)
        kind, ea, a, ka, eb, b, kb = _draw(
            s, level, rows, slots, least, pin, allowed, holders, copies, content, used, held < most_copies
        )
        if kind < 0:
            continue
        ja = position(ea, a, holders, copies)
        _shift_levels(kind, ea, ja, a, eb, b, touch, rows, per_touch, per_row, holders, copies, share, level)
        delta = apply_move(kind, ea, a, ka, eb, b, kb, holders, copies, content, used, share, present)
        added = number
        if kind in (REPLACE, ADD) and copies[eb] == 2:
            several[number] = eb
            added += 1
        done = 0
        if apart_enough(ea, holders, copies, domain, apart) and apart_enough(
            eb, holders, copies, domain, apart
        ):
            gained, wanted = 0.0, price * delta + 1e-7 * best
            for n in range(scenarios):
                # First the scenario in which this host is slow.
                t = (s + n) % scenarios
                pour_these(
                    several, added, holders, copies, touch[t], rows[t], per_touch, per_row,
                    share[t], level[t], tolerance, _SWEEPS,
                )  # fmt: skip
                now[t] = objective(level[t])
                gained += reached[t] - now[t]
                done = n + 1
                if done % _PATIENCE == 0 and gained <= done * min(0.0, wanted):
                    break
            if done == scenarios and gained / scenarios > wanted:
                blobs += delta
                held += kind == ADD
                number = _with_copies(copies, several)
                for t in range(scenarios):
                    # Added up anew, since small steps leave small errors.
                    levels(holders, copies, touch[t], rows[t], fixed, per_touch, per_row, share[t], level[t])
                    reached[t] = objective(level[t])
                best = reached.mean()
                path[moves, 0], path[moves, 1], path[moves, 2] = kind, ea, a
                path[moves, 3], path[moves, 4], path[moves, 5] = eb, b, blobs
                after[moves] = best
                moves += 1
                _copy_shares(np.arange(experts), experts, copies, share, kept_share)
                kept_level[:] = level
                continue
        undo_move(kind, ea, a, ja, ka, eb, b, kb, holders, copies, content, used)
        _copy_shares(several, added, copies, kept_share, share)
        _copy_shares(np.array([ea, eb], np.int32), 2, copies, kept_share, share)
        level[:] = kept_level
    return moves, before, after[:moves].copy()


@njit(cache=True, nogil=True)
def _draw(s, level, rows, slots, least, pin, allowed, holders, copies, content, used, may_add):
    """A move that is allowed but for failure domains, of a copy on a host that is among the slower ones of a scenario:
    (kind, expert, its host, its place there, other expert, its host, its place there); kind -1 if none was drawn.
    """
    hosts, experts = len(slots), len(copies)
    a = np.random.randint(hosts)
    for _ in range(2):
        other = np.random.randint(hosts)
        if level[s, other] > level[s, a]:
            a = other
    none = -1, 0, a, 0, 0, a, 0
    if used[a] == 0:
        return none
    ka = np.random.randint(used[a])
    ea = int(content[a, ka])
    kind = np.random.randint(4 if may_add else 3)
    if kind == SWAP:
        b = np.random.randint(hosts)
        if b == a or used[b] == 0:
            return none
        kb = np.random.randint(used[b])
        eb = int(content[b, kb])
        if (
            eb != ea
            and may_hold(ea, b, holders, copies, pin, allowed)
            and may_hold(eb, a, holders, copies, pin, allowed)
        ):
            return SWAP, ea, a, ka, eb, b, kb
        return none
    if kind == REPLACE:
        eb = np.random.randint(experts)
        other = np.random.randint(experts)
        if rows[s, other] / copies[other] > rows[s, eb] / copies[eb]:
            eb = other
        wins = eb != ea and copies[ea] > least[ea] and copies[eb] < holders.shape[1]
        if wins and may_hold(eb, a, holders, copies, pin, allowed):
            return REPLACE, ea, a, ka, eb, a, 0
        return none
    b = np.random.randint(hosts)
    if used[b] >= slots[b] or not may_hold(ea, b, holders, copies, pin, allowed):
        return none
    if kind == ADD and copies[ea] >= holders.shape[1]:
        return none
    return kind, ea, a, ka, ea, b, 0


@njit(cache=True, nogil=True)
def _shift_levels(kind, ea, ja, a, eb, b, touch, rows, per_touch, per_row, holders, copies, share, level):
    """The hosts' levels as they are right after a move that is about to be made."""
    if kind == ADD:
        return  # the new copy begins with nothing
    jb = position(eb, b, holders, copies) if kind == SWAP else 0
    # A copy that is dropped leaves its share to the expert's first one, or if it is that, to the last.
    heir = b
    if kind == REPLACE:
        heir = holders[ea, 0] if ja != 0 else holders[ea, copies[ea] - 1]
    for s in range(len(level)):
        moved = share[s, ea, ja]
        level[s, a] -= moved * (per_touch[a] * touch[s, ea] + per_row[a] * rows[s, ea])
        level[s, heir] += moved * (per_touch[heir] * touch[s, ea] + per_row[heir] * rows[s, ea])
        if kind == SWAP:
            moved = share[s, eb, jb]
            level[s, b] -= moved * (per_touch[b] * touch[s, eb] + per_row[b] * rows[s, eb])
            level[s, a] += moved * (per_touch[a] * touch[s, eb] + per_row[a] * rows[s, eb])


@njit(cache=True, nogil=True)
def _with_copies(copies, several):
    """Write the experts that have a choice of hosts to `several`; how many they are."""
    number = 0
    for e in range(len(copies)):
        if copies[e] > 1:
            several[number] = e
            number += 1
    return number


@njit(cache=True, nogil=True)
def _copy_shares(experts, number, copies, source, target):
    """Of these experts and the copies that there are: the arrays are as wide as for the hottest."""
    for s in range(source.shape[0]):
        for at in range(number):
            e = experts[at]
            for j in range(copies[e]):
                target[s, e, j] = source[s, e, j]
