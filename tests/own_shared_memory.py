"""A /dev/shm of one's own, for tests that run beside others and prove that nothing is left in it."""

from __future__ import annotations

import ctypes
import os

# Of Linux's headers sched.h and mount.h.
_NEW_MOUNTS, _PRIVATE = 0x20000, 0x4000 | 0x40000


def own_shared_memory() -> None:
    """Give the calling thread, and all that it starts, an empty /dev/shm of their own. OSError if it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        lambda: libc.unshare(_NEW_MOUNTS),
        # Or the next one would be everybody's.
        lambda: libc.mount(b"none", b"/", None, _PRIVATE, None),
        lambda: libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777"),
    ):
        if done() != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    # For make: whether two processes may run tests side by side.
    try:
        own_shared_memory()
    except OSError:
        print(1)
    else:
        print(2)
