"""Processes by a mark in the environment that they inherited: found however deep, and nothing else is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

_LOOK_S = 0.05


def marked(name: str, value: str) -> list[psutil.Process]:
    """Every living process with this environment variable, and all that descend from one.

    A process that gives itself a title may write over its own environment (Ray's agents do); its parent tells
    whose it is then.
    """
    living = [process for process in psutil.process_iter() if _lives(process)]
    children: dict[int, list[psutil.Process]] = {}
    for process in living:
        with contextlib.suppress(psutil.Error):
            children.setdefault(process.ppid(), []).append(process)
    found: dict[int, psutil.Process] = {}
    new = [process for process in living if environment(process).get(name) == value]
    while new:
        process = new.pop()
        if process.pid not in found:
            found[process.pid] = process
            new += children.get(process.pid, [])
    return sorted(found.values(), key=lambda process: process.pid)


def kill_all(find: Callable[[], Sequence[psutil.Process]], timeout_s: float) -> list[psutil.Process]:
    """SIGKILL to all that `find` finds, in its order; what has not ended after `timeout_s`.

    They are stopped before, and looked for again until there are no others: one that is being started has its
    parent's end else as its chance to be seen by nobody.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        held: dict[int, psutil.Process] = {}
        while fresh := [process for process in find() if process.pid not in held]:
            for process in fresh:
                held[process.pid] = process
                with contextlib.suppress(psutil.Error):
                    process.suspend()
        for process in held.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, living = psutil.wait_procs(list(held.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not held or time.monotonic() >= deadline:
            return living
        time.sleep(_LOOK_S)


def _lives(process: psutil.Process) -> bool:
    """Whether it has not ended: a parent that is stopped leaves its ended children where they are."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def environment(process: psutil.Process) -> Mapping[str, str]:
    """What the process began with; empty for one that has ended or may not be read."""
    # Not psutil's reading, which ends at the first empty entry: the title of Ray's agents leaves some in front.
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:  # ProcessLookupError is one
        return {}
    entries = (entry.decode(errors="replace").partition("=") for entry in block.split(b"\0"))
    return {name: value for name, found, value in entries if found}
