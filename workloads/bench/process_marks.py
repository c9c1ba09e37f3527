"""Processes by a mark in the environment that they inherited: found however deep, and nothing else is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil


def marked(name: str, value: str) -> list[psutil.Process]:
    """Every living process with this environment variable."""
    return [process for process in psutil.process_iter() if environment(process).get(name) == value]


def environment(process: psutil.Process) -> Mapping[str, str]:
    """What the process began with; empty for one that has ended or may not be read."""
    # Not psutil's reading, which ends at the first empty entry: the title of Ray's agents leaves some in front.
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:  # ProcessLookupError is one
        return {}
    entries = (entry.decode(errors="replace").partition("=") for entry in block.split(b"\0"))
    return {name: value for name, found, value in entries if found}
