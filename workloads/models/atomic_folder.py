"""A folder that is either complete or absent: built beside its place, then renamed.

One process builds at a time (a file lock that the kernel drops with its holder), so a partial folder found
under the lock belongs to a builder that died, and is removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.errors import CheckpointError
from workloads.models.progress import Progress

_PARTIAL = "partial"
_REPLACED = "replaced"


@contextmanager
def locked(target: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of ``target``, waiting for another process that builds it.

    Raises CheckpointError if the parent folder cannot be made or written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("waiting for another process that makes this model", 0.0)
            lock.acquire()
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(target: Path, *, needed_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends, and vanishes when it raises.

    Call it under :func:`locked`. ``needed_bytes`` is checked against the free disk space first. Raises
    CheckpointError if ``target`` exists and ``overwrite`` is false, if the disk is too full, or if the
    folder cannot be written.
    """
    try:
        _remove_leftovers(target)
        if target.exists() and not overwrite:
            raise CheckpointError(f"{target} exists already", "choose another folder, or overwrite it")
        _check_space(target.parent, needed_bytes)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.{_PARTIAL}-", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    try:
        yield partial
        # Data first, then the name: a power cut must not leave a complete-looking folder of empty files.
        for file in partial.iterdir():
            # mkdtemp and safetensors write for the owner only, but a model may be meant for a group of users.
            file.chmod(0o666 & ~_umask())
            _sync(file)
        partial.chmod(0o777 & ~_umask())
        _sync(partial)
        _swap_in(partial, target)
        _sync(target.parent)
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap_in(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``; what was there goes last, so a failure leaves one of the two."""
    if not target.exists():
        partial.rename(target)
        return
    replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.{_REPLACED}-", dir=target.parent))
    old = target.rename(replaced / target.name)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    for replaced in target.parent.glob(f".{target.name}.{_REPLACED}-*"):
        old = replaced / target.name
        if old.exists() and not target.exists():
            old.rename(target)  # died between the two renames: the old folder is still the good one
        shutil.rmtree(replaced, ignore_errors=True)
    for partial in target.parent.glob(f".{target.name}.{_PARTIAL}-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.1f} GB free, the model needs {needed_bytes / 1e9:.1f} GB",
            "free some space, or name a folder on another disk",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write the model under {folder}: {error}", "name a folder that can be written"
    )
