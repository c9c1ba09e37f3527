"""Starts an expert host without taking the cores from those that serve meanwhile, or from the router that starts too.

Importing and loading keep cores busy for seconds. With Linux's idle policy they use what the others leave, and give it
back at once: at a merely lower priority (nice 10) two hosts that were started again added 370 ms to the longest gap
between two tokens, with the idle policy 100 to 230 ms, and were ready after 8 s instead of 6. A process may always
take that policy, but leave it only if it is allowed to (root, CAP_SYS_NICE, or `ulimit -e`): one that is not stays as
it is, or it would have to serve so.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cluster import niceness

# On cores that are never free a host would never start: after this long it takes its share.
_PATIENCE_S: Final = 20.0


def may_return() -> bool:
    """Whether a thread of this process could take the idle policy and leave it again; tried in one that ends."""
    returned: list[bool] = []

    def attempt() -> None:
        try:
            # In Linux each thread has a policy of its own; 0 is the calling one.
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            returned.append(True)
        except OSError:
            returned.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return returned == [True]


def lower(patience_s: float = _PATIENCE_S) -> bool:
    """Have all threads of this process, and those that they will start, run on cores that nobody else wants, for
    `patience_s` at most; whether that can be undone, else nothing is done.
    """
    if not may_return():
        return False
    _set_all(os.SCHED_IDLE)
    timer = threading.Timer(patience_s, restore)
    timer.daemon = True
    timer.start()
    return True


def give_way() -> None:
    """The same for good: what is left of this process's life is its end.

    The kernel frees a dead process's memory in that process's time, seconds of a core for gigabytes.
    """
    _set_all(os.SCHED_IDLE)


def restore() -> None:
    """Give all threads the usual policy and priority."""
    _set_all(os.SCHED_OTHER)
    niceness.usual()


def _set_all(policy: int) -> None:
    for thread in _threads():
        # One may have ended since it was listed.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def _threads() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc/self/task").iterdir())
