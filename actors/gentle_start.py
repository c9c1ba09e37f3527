"""Starts a process that takes a lost one's place without taking the cores from those that serve meanwhile.

Importing and loading keep two cores busy for seconds. At a lower priority they use what the others leave. A process
may lower its own priority, but raise it again only if it is allowed to (root, CAP_SYS_NICE, or `ulimit -e`): one
that is not stays as it is, or it would have to serve at the low one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# A tenth of the weight of a process that serves, where both want the same core.
_NICENESS: Final = 10


def may_return(niceness: int = _NICENESS) -> bool:
    """Whether a thread of this process could lower its priority and raise it again; tried in one that ends."""
    returned: list[bool] = []

    def attempt() -> None:
        own, before = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0)
        try:
            # In Linux each thread has a priority of its own.
            os.setpriority(os.PRIO_PROCESS, own, before + niceness)
            os.setpriority(os.PRIO_PROCESS, own, before)
            returned.append(True)
        except OSError:
            returned.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return returned == [True]


def lower(niceness: int = _NICENESS) -> bool:
    """Lower the priority of all threads of this process, and of those that they will start, if it can be undone."""
    if not may_return(niceness):
        return False
    _set_all(niceness)
    return True


def restore() -> None:
    """Give all threads the usual priority."""
    _set_all(0)


def _set_all(niceness: int) -> None:
    for thread in _threads():
        # One may have ended since it was listed.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _threads() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc/self/task").iterdir())
