"""What one layer's placement looks like to the planner's compiled code, and the moves that change it.

Arrays, as everywhere in the planner: holders int32 [E, M] and copies int32 [E], the hosts of each expert;
content int32 [H, C] and used int32 [H], the same by host; pin int32 [E] is a row of allowed bool [P, H], the hosts that
an expert may be on; domain int32 [H], each host's failure domain, and apart int32 [E], in how many an expert must be.
E = experts, M = most copies of one, H = hosts, C = most slots, P = kinds of pins, S = scenarios.
"""

from __future__ import annotations

from numba import njit

SWAP, REPLACE, RELOCATE, ADD = 0, 1, 2, 3
"""Two experts change hosts; an expert's copy gives its slot to another expert; a copy goes to a free slot; an expert
gets one copy more in a free slot."""


@njit(cache=True, nogil=True)
def holds(e, h, holders, copies):
    for j in range(copies[e]):
        if holders[e, j] == h:
            return True
    return False


@njit(cache=True, nogil=True)
def position(e, h, holders, copies):
    for j in range(copies[e]):
        if holders[e, j] == h:
            return j
    return -1


@njit(cache=True, nogil=True)
def may_hold(e, h, holders, copies, pin, allowed):
    return allowed[pin[e], h] and not holds(e, h, holders, copies)


@njit(cache=True, nogil=True)
def apart_enough(e, holders, copies, domain, apart):
    """Whether an expert is in as many failure domains as it must be, with the copies that it has."""
    wanted = min(apart[e], copies[e])
    if wanted < 2:
        return True
    distinct = 0
    for j in range(copies[e]):
        first = True
        for i in range(j):
            if domain[holders[e, i]] == domain[holders[e, j]]:
                first = False
        distinct += first
    return distinct >= wanted


@njit(cache=True, nogil=True)
def place(e, h, holders, copies, content, used):
    holders[e, copies[e]] = h
    copies[e] += 1
    content[h, used[h]] = e
    used[h] += 1


@njit(cache=True, nogil=True)
def _drop(e, h, holders, copies, share):
    """Take a copy away; its share goes to the expert's first one."""
    j, last = position(e, h, holders, copies), copies[e] - 1
    holders[e, j] = holders[e, last]
    copies[e] = last
    for s in range(share.shape[0]):
        freed = share[s, e, j]
        share[s, e, j] = share[s, e, last]
        share[s, e, last] = 0.0
        share[s, e, 0] += freed


@njit(cache=True, nogil=True)
def apply_move(kind, ea, a, ka, eb, b, kb, holders, copies, content, used, share, present):
    """Make a move; how many more blobs are to be loaded then. Of ADD only `eb` and `b` count."""
    if kind == SWAP:
        holders[ea, position(ea, a, holders, copies)] = b
        holders[eb, position(eb, b, holders, copies)] = a
        content[a, ka], content[b, kb] = eb, ea
        return _new(b, ea, present) + _new(a, eb, present) - _new(a, ea, present) - _new(b, eb, present)
    if kind == REPLACE:
        _drop(ea, a, holders, copies, share)
        holders[eb, copies[eb]] = a
        # What a copy that was taken back had there.
        share[:, eb, copies[eb]] = 0.0
        copies[eb] += 1
        content[a, ka] = eb
        return _new(a, eb, present) - _new(a, ea, present)
    if kind == ADD:
        share[:, eb, copies[eb]] = 0.0
        place(eb, b, holders, copies, content, used)
        return _new(b, eb, present)
    holders[ea, position(ea, a, holders, copies)] = b
    used[a] -= 1
    content[a, ka] = content[a, used[a]]
    content[b, used[b]] = ea
    used[b] += 1
    return _new(b, ea, present) - _new(a, ea, present)


@njit(cache=True, nogil=True)
def undo_move(kind, ea, a, ja, ka, eb, b, kb, holders, copies, content, used):
    """Back, but for the shares and levels, which are copied from those that were kept."""
    if kind == SWAP:
        holders[ea, position(ea, b, holders, copies)] = a
        holders[eb, position(eb, a, holders, copies)] = b
        content[a, ka], content[b, kb] = ea, eb
    elif kind == REPLACE:
        copies[eb] -= 1
        # To where it was: shares are kept by position.
        holders[ea, copies[ea]] = holders[ea, ja]
        holders[ea, ja] = a
        copies[ea] += 1
        content[a, ka] = ea
    elif kind == ADD:
        copies[eb] -= 1
        used[b] -= 1
    else:
        holders[ea, position(ea, b, holders, copies)] = a
        used[b] -= 1
        content[a, used[a]] = content[a, ka]
        content[a, ka] = ea
        used[a] += 1


@njit(cache=True, nogil=True)
def _new(h, e, present):
    return 0 if present[h, e] else 1


def apply_path(path, holders, copies):
    """Make the moves that a search wrote down, rows of (kind, expert, its host, other expert, its host, blobs)."""
    for kind, ea, a, eb, b, _ in path:
        if kind == REPLACE:
            holders[ea, position(ea, a, holders, copies)] = holders[ea, copies[ea] - 1]
            copies[ea] -= 1
            holders[eb, copies[eb]] = a
            copies[eb] += 1
            continue
        if kind == ADD:
            holders[eb, copies[eb]] = b
            copies[eb] += 1
            continue
        holders[ea, position(ea, a, holders, copies)] = b
        if kind == SWAP:
            holders[eb, position(eb, b, holders, copies)] = a
