"""Where the replicas of one layer go: a local search that looks at many steps' loads at once.

A placement is judged by the time of the slowest host after the best split (`cluster.balance`), averaged over several
scenarios, so that what it is good at is not one average load but the loads that come. Hot experts' replicas then
link hosts to each other, and what one host has too much of flows on along these links: the long chain of Jordan and
Graves ("Principles on the benefits of manufacturing process flexibility", 1995), found by search.

Arrays as in `cluster.placement_moves`. Compiled by Numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cluster.balance import even, levels, pour
from cluster.placement_moves import REPLACE, SWAP, apart_enough, apply_move, may_hold, position, undo_move

# The maximum alone gives a search no direction while several hosts are the slowest.
_REST = 0.3
_SWEEPS = 4
_TOLERANCE = 1e-3


@njit(cache=True, nogil=True)
def search(
    touch, rows, fixed, per_touch, per_row, slots, least, domain, apart, pin, allowed,
    holders, copies, content, used, present, price, tries, seed, path,
):  # fmt: skip
    """Improve a placement move by move; every accepted one is written to `path` [tries, 6].

    Args: touch and rows [S, E], present bool [H, E]: what hosts hold now, for every blob beyond which `price`
    (a share of the objective) must be gained. A row of `path` is kind, expert, its host, other expert, its host, and
    blobs that are to be loaded then. Returns (number of moves, objective before, objective after each move [tries]).
    """
    np.random.seed(seed)
    scenarios, experts = touch.shape
    hosts = len(slots)
    share = np.zeros((scenarios, experts, holders.shape[1]))
    level = np.zeros((scenarios, hosts))
    for s in range(scenarios):
        even(holders, copies, touch[s], rows[s], fixed, per_touch, per_row, share[s], level[s])
        pour(holders, copies, touch[s], rows[s], per_touch, per_row, share[s], level[s], 0.0, 50)
    best = before = _objective(level)
    after = np.empty(tries)
    tolerance = _TOLERANCE * before
    price = price * before
    kept_share, kept_level = share.copy(), level.copy()
    blobs = moves = 0
    for h in range(hosts):
        for k in range(used[h]):
            blobs += not present[h, content[h, k]]
    for _ in range(tries):
        # A copy on a host that is among the slower ones of a scenario.
        s = np.random.randint(scenarios)
        a = np.random.randint(hosts)
        for _ in range(2):
            other = np.random.randint(hosts)
            if level[s, other] > level[s, a]:
                a = other
        if used[a] == 0:
            continue
        ka = np.random.randint(used[a])
        ea = content[a, ka]
        kind = np.random.randint(3)
        b, eb, kb = a, ea, 0
        if kind == SWAP:
            b = np.random.randint(hosts)
            if b == a or used[b] == 0:
                continue
            kb = np.random.randint(used[b])
            eb = content[b, kb]
            if eb == ea or not (
                may_hold(ea, b, holders, copies, pin, allowed)
                and may_hold(eb, a, holders, copies, pin, allowed)
            ):
                continue
        elif kind == REPLACE:
            eb = np.random.randint(experts)
            other = np.random.randint(experts)
            if rows[s, other] / copies[other] > rows[s, eb] / copies[eb]:
                eb = other
            if eb == ea or copies[ea] <= least[ea] or copies[eb] >= holders.shape[1]:
                continue
            if not may_hold(eb, a, holders, copies, pin, allowed):
                continue
        else:
            b = np.random.randint(hosts)
            if used[b] >= slots[b] or not may_hold(ea, b, holders, copies, pin, allowed):
                continue
        ja = position(ea, a, holders, copies)
        delta = apply_move(kind, ea, a, ka, eb, b, kb, holders, copies, content, used, share, present)
        if apart_enough(ea, holders, copies, domain, apart) and apart_enough(
            eb, holders, copies, domain, apart
        ):
            for t in range(scenarios):
                levels(holders, copies, touch[t], rows[t], fixed, per_touch, per_row, share[t], level[t])
                pour(
                    holders,
                    copies,
                    touch[t],
                    rows[t],
                    per_touch,
                    per_row,
                    share[t],
                    level[t],
                    tolerance,
                    _SWEEPS,
                )
            value = _objective(level)
            if value + price * delta < best * (1 - 1e-7):
                best = value
                blobs += delta
                path[moves, 0], path[moves, 1], path[moves, 2] = kind, ea, a
                path[moves, 3], path[moves, 4], path[moves, 5] = eb, b, blobs
                after[moves] = best
                moves += 1
                _copy_shares(copies, share, kept_share)
                kept_level[:] = level
                continue
        undo_move(kind, ea, a, ja, ka, eb, b, kb, holders, copies, content, used)
        _copy_shares(copies, kept_share, share)
        level[:] = kept_level
    return moves, before, after[:moves].copy()


@njit(cache=True, nogil=True)
def _copy_shares(copies, source, target):
    """Of the copies that there are: most experts have few, and the arrays are as wide as for the hottest."""
    for s in range(source.shape[0]):
        for e in range(source.shape[1]):
            for j in range(copies[e]):
                target[s, e, j] = source[s, e, j]


@njit(cache=True, nogil=True)
def _objective(level):
    total = 0.0
    for s in range(level.shape[0]):
        longest = rest = 0.0
        for h in range(level.shape[1]):
            longest = max(longest, level[s, h])
            rest += level[s, h] ** 4
        total += longest + _REST * (rest / level.shape[1]) ** 0.25
    return total / level.shape[0]


@njit(cache=True, nogil=True)
def step_seconds(holders, copies, touch, rows, fixed, per_touch, per_row):
    """Seconds of the slowest host under the best split, averaged over the scenarios."""
    hosts = len(fixed)
    share, level = np.zeros((len(copies), holders.shape[1])), np.zeros(hosts)
    total = 0.0
    for s in range(touch.shape[0]):
        even(holders, copies, touch[s], rows[s], fixed, per_touch, per_row, share, level)
        pour(holders, copies, touch[s], rows[s], per_touch, per_row, share, level, 1e-6 * level.max(), 200)
        total += level.max()
    return total / touch.shape[0]
