"""Ends a process that takes more memory than it may, with its last words, before the kernel picks a victim."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

# A host that grows does so by whole layers or batches; reading one small file ten times a second costs nothing.
_PERIOD_S: Final = 0.1
_STATUS: Final = Path("/proc/self/status")


def own_bytes(status: Path = _STATUS) -> int:
    """Bytes of memory that are this process's alone: without the pages of mapped files, which can be had again."""
    for line in status.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def guard(
    limit_bytes: int, exceeded: Callable[[str], None], measure: Callable[[], int] = own_bytes
) -> threading.Thread:
    """Call `exceeded` with the reason, once, as soon as the process takes more than `limit_bytes`."""

    def watch() -> None:
        while (taken := measure()) <= limit_bytes:
            time.sleep(_PERIOD_S)
        exceeded(f"its process took {_mib(taken)}, its memory_limit is {_mib(limit_bytes)}")

    thread = threading.Thread(target=watch, name="expertmesh-memory", daemon=True)
    thread.start()
    return thread


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
