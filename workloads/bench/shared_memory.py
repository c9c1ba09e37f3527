"""What lies in /dev/shm, and what of it nobody holds any more."""

from __future__ import annotations

import contextlib
import os
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
    # By inode and not by name: a semaphore is made and mapped under another name than it gets then.
    inodes: set[tuple[int, int]] = set()
    for process in psutil.process_iter():
        folder = Path(f"/proc/{process.pid}")
        # Not another user's, or one that ends meanwhile.
        with contextlib.suppress(OSError):
            for line in (folder / "maps").read_text(errors="replace").splitlines():
                if _FOLDER in line:
                    major, _, minor = line.split()[3].partition(":")
                    inodes.add((os.makedev(int(major, 16), int(minor, 16)), int(line.split()[4])))
        with contextlib.suppress(OSError):
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()).startswith(_FOLDER):
                        status = link.stat()
                        inodes.add((status.st_dev, status.st_ino))
    return {name for name in names() if _is_held(name, inodes)}


def _is_held(name: str, inodes: Collection[tuple[int, int]]) -> bool:
    # Intel's OpenMP runtime keeps one for each process that uses it, and does not keep it open.
    if name.startswith(_OPENMP) and psutil.pid_exists(_maker(name)):
        return True
    try:
        status = (Path(_FOLDER) / name).stat()
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in inodes


def _maker(name: str) -> int:
    """The process that an entry of OpenMP's is of; 0 if it does not say."""
    number = name.removeprefix(_OPENMP).split("_")[0]
    return int(number) if number.isdecimal() else 0
