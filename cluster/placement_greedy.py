"""A first placement of one layer: how many copies of each expert, and a host for every copy, greedily.

Arrays as in `cluster.placement_moves`. Compiled by Numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cluster.placement_moves import apart_enough, may_hold, place, position


@njit(cache=True, nogil=True)
def copies_wanted(load, least, most, wanted):
    """Copies per expert, `wanted` in all where `most` [E] admits it: always one more for the largest load per copy.

    Shared evenly this is the least maximum that any numbers of copies have (DeepSeek's EPLB chooses them so too).
    """
    target = least.copy()
    for _ in range(wanted - least.sum()):
        best, hottest = -1.0, -1
        for e in range(len(load)):
            if target[e] < most[e] and load[e] / target[e] > best:
                best, hottest = load[e] / target[e], e
        if hottest < 0:
            break
        target[hottest] += 1
    return target


@njit(cache=True, nogil=True)
def greedy(load, target, speed, slots, least, domain, apart, pin, allowed, holders, copies, content, used):
    """Place `target` [E] copies, those of the hottest experts first, each where the host is least loaded.

    Args: load [E], speed [H], slots int32 [H], least int32 [E] copies that an expert must have, in as many distinct
    `domain` [H] as `apart` [E] says; `pin` [E] is a row of `allowed` [P, H], the hosts that an expert may be on.
    Adds to holders [E, M], copies [E], content [H, C] and used [H], which may hold copies already. Copies beyond the
    least that find no host make room for other experts'. Returns the first expert that lacks a copy that it must
    have, or -1.
    """
    level = np.zeros(len(slots))
    for e in range(len(load)):
        for j in range(copies[e]):
            level[holders[e, j]] += load[e] / target[e]
    order = np.argsort(-load / target)
    for must in (True, False):
        for e in order:
            weight = load[e] / target[e]
            for _ in range(copies[e], least[e] if must else target[e]):
                h = _best_host(
                    e, weight, level, speed, slots, domain, apart, pin, allowed, holders, copies, used
                )
                if h < 0 and must:
                    h = _make_room(e, slots, domain, apart, pin, allowed, holders, copies, content, used)
                if h < 0:
                    if must:
                        return e
                    break
                place(e, h, holders, copies, content, used)
                level[h] += weight
    for _ in range(target.sum() - copies.sum()):
        if not _fill_one(load, slots, pin, allowed, holders, copies, content, used):
            break
    return -1


@njit(cache=True, nogil=True)
def _best_host(e, weight, level, speed, slots, domain, apart, pin, allowed, holders, copies, used):
    chosen, lowest = -1, np.inf
    for h in range(len(slots)):
        if used[h] >= slots[h] or (level[h] + weight) / speed[h] >= lowest:
            continue
        if _may_add(e, h, domain, apart, pin, allowed, holders, copies):
            lowest, chosen = (level[h] + weight) / speed[h], h
    return chosen


@njit(cache=True, nogil=True)
def _may_add(e, h, domain, apart, pin, allowed, holders, copies):
    """Whether a first or further copy may come to a host: those that must be in other domains come first."""
    if not may_hold(e, h, holders, copies, pin, allowed):
        return False
    if copies[e] >= apart[e]:
        return True
    for j in range(copies[e]):
        if domain[holders[e, j]] == domain[h]:
            return False
    return True


@njit(cache=True, nogil=True)
def _make_room(e, slots, domain, apart, pin, allowed, holders, copies, content, used):
    """A host for an expert where none has both room and leave: others move on, one to the next one's place, the last
    to the room that there is (an augmenting path, as in bipartite matching).
    """
    hosts = len(slots)
    # Breadth first, from where the expert may be: the host whose copy would come here, and its place there.
    giver, place_there = np.full(hosts, -1, np.int32), np.zeros(hosts, np.int32)
    queue, seen, at = np.empty(hosts, np.int32), 0, 0
    for g in range(hosts):
        if slots[g] > 0 and _may_add(e, g, domain, apart, pin, allowed, holders, copies):
            giver[g], queue[seen] = g, g
            seen += 1
    while at < seen:
        g = queue[at]
        at += 1
        for k in range(used[g]):
            f = content[g, k]
            if f == e or _moves(f, g, giver, place_there, content):
                continue
            for h in range(hosts):
                if giver[h] >= 0 or slots[h] == 0 or not may_hold(f, h, holders, copies, pin, allowed):
                    continue
                j = position(f, g, holders, copies)
                holders[f, j] = h
                fits = apart_enough(f, holders, copies, domain, apart)
                holders[f, j] = g
                if not fits:
                    continue
                giver[h], place_there[h], queue[seen] = g, k, h
                seen += 1
                if used[h] < slots[h]:
                    return _move_on(h, giver, place_there, holders, copies, content, used)
    return -1


@njit(cache=True, nogil=True)
def _moves(f, h, giver, place_there, content):
    """Whether a copy of this expert moves already on the way to a host."""
    while giver[h] != h:
        if content[giver[h], place_there[h]] == f:
            return True
        h = giver[h]
    return False


@njit(cache=True, nogil=True)
def _move_on(h, giver, place_there, holders, copies, content, used):
    """Make the moves of a path from its end; the host at its beginning, which has room then."""
    while giver[h] != h:
        g, k = giver[h], place_there[h]
        f = content[g, k]
        holders[f, position(f, g, holders, copies)] = h
        content[h, used[h]] = f
        used[h] += 1
        used[g] -= 1
        content[g, k] = content[g, used[g]]
        h = g
    return h


@njit(cache=True, nogil=True)
def _fill_one(load, slots, pin, allowed, holders, copies, content, used):
    """One more copy of the hottest expert that finds room."""
    best, expert, host = -1.0, -1, -1
    for h in range(len(slots)):
        if used[h] >= slots[h]:
            continue
        for e in range(len(load)):
            if (
                load[e] / copies[e] > best
                and copies[e] < holders.shape[1]
                and may_hold(e, h, holders, copies, pin, allowed)
            ):
                best, expert, host = load[e] / copies[e], e, h
    if expert < 0:
        return False
    place(expert, host, holders, copies, content, used)
    return True
