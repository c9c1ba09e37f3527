"""A disk that is full soon, for the calling thread alone: a tmpfs in a mount namespace of its own."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# Of Linux's headers sched.h and mount.h.
_NEW_MOUNTS, _PRIVATE = 0x20000, 0x4000 | 0x40000


def small_disk(folder: Path, size: int) -> None:
    """Mount `size` bytes at a folder; the mount ends with the thread. OSError if it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        lambda: libc.unshare(_NEW_MOUNTS),
        # Or the next one would be everybody's.
        lambda: libc.mount(b"none", b"/", None, _PRIVATE, None),
        lambda: libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()),
    ):
        if done() != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
