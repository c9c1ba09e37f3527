"""How willingly a process gives its cores away: Ray's workers start nice, ours serve at the usual priority.

A worker's start takes a second of a core, before any code of ours runs in it. On cores that serve at the same time that
is felt; nice, it is not. Who may not take a lower number again than it has (anybody but root, without CAP_SYS_NICE or
`ulimit -e`) must have Ray start workers at 0.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

RAY_VARIABLE: Final = "RAY_worker_niceness"
# Ray's own default.
_NICE: Final = 15


def may_return() -> bool:
    """Whether a thread of this process could become nicer and then less so again; tried in one that ends."""
    returned: list[bool] = []

    def attempt() -> None:
        try:
            # In Linux each thread has a number of its own; 0 is the calling one.
            before = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, 0, min(19, before + 1))
            os.setpriority(os.PRIO_PROCESS, 0, min(before, 0))
            returned.append(True)
        except OSError:
            returned.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return returned == [True]


def of_workers() -> str:
    """The number that Ray is to start workers with, as its variable has it."""
    return str(_NICE if may_return() else 0)


def yield_cores() -> None:
    """Make the calling thread, and those that it starts, nice for good: what it does can wait for those that serve."""
    # In Linux a thread's number is its own; a higher one is always allowed.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def usual() -> None:
    """Give all threads of this process the usual priority, where that is allowed."""
    for entry in Path("/proc/self/task").iterdir():
        # One may have ended since it was listed, and who may not was started at 0.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(entry.name), 0)
