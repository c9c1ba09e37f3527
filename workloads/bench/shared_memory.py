"""What lies in /dev/shm, and what of it nobody holds any more."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

import psutil

_FOLDER = "/dev/shm/"
_OPENMP = "__KMP_REGISTERED_LIB_"


def names() -> set[str]:
    """Entries of /dev/shm, without those of Ray's compiled graphs, which the mesh has none of."""
    found = {entry.name for entry in Path(_FOLDER).iterdir()}
    return {name for name in found if not name.startswith(("sem.hdr", "sem.obj"))}


def left_behind(before: Collection[str]) -> set[str]:
    """Entries that were not there before and that no living process has open or mapped."""
    fresh = names().difference(before)
    return fresh - _held() if fresh else fresh


def _held() -> set[str]:
    held = set()
    for process in psutil.process_iter():
        folder = Path(f"/proc/{process.pid}")
        # Not another user's, or one that ends meanwhile.
        with contextlib.suppress(OSError):
            for line in (folder / "maps").read_text(errors="replace").splitlines():
                held.add(line.partition(_FOLDER)[2].removesuffix(" (deleted)"))
        with contextlib.suppress(OSError):
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(str(link.readlink()).partition(_FOLDER)[2].removesuffix(" (deleted)"))
    # Intel's OpenMP runtime keeps one for each process that uses it, and does not keep it open.
    openmp = (name for name in names() if name.startswith(_OPENMP))
    return held | {name for name in openmp if psutil.pid_exists(_maker(name))}


def _maker(name: str) -> int:
    """The process that an entry of OpenMP's is of; 0 if it does not say."""
    number = name.removeprefix(_OPENMP).split("_")[0]
    return int(number) if number.isdecimal() else 0
