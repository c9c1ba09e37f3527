"""A folder of files that are written once: on this machine's disk, or on any object store that fsspec knows."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import VersionError

_TEMPORARY = ".writing-"


class Files:
    """Names are relative to the folder, with slashes."""

    def __init__(self, url: str, **options: Any) -> None:
        """`options` are the file system's own, such as ``endpoint_url`` of an S3-compatible server.

        VersionError if the URL can't be made sense of, or the file system's package is not installed.
        """
        try:
            self._system, root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise VersionError(
                f"the store {url} can't be opened: {error}",
                "give a folder, or a URL whose fsspec package is installed (s3:// needs s3fs, gs:// gcsfs)",
            ) from error
        self.url = url
        self._root = root.rstrip("/")
        self._local = isinstance(self._system, LocalFileSystem)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file, whole and on disk when this returns; False if there is one of that name, which stays.

        VersionError if it can't be written: the disk is full, say. Nothing of it is left then.
        """
        try:
            if self._local:
                return self._create_here(Path(self._path(name)), data)
            try:
                self._system.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        except OSError as error:
            raise VersionError(
                f"{name} can't be written to {self.url}: {error.strerror or error}",
                "make room, or see who may write there; nothing was changed",
            ) from error

    def read(self, name: str) -> bytes:
        """VersionError if there is no such file, or it can't be read."""
        try:
            return bytes(self._system.cat_file(self._path(name)))
        except FileNotFoundError as error:
            raise VersionError(f"{self.url} has no {name}", "see `expertmesh versions list`") from error
        except OSError as error:
            raise VersionError(f"{name} can't be read from {self.url}: {error}") from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return bool(self._system.isfile(self._path(name)))

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder and below it, sorted; none if there is no such folder."""
        # Object stores are listed anew: others write there too.
        self._system.invalidate_cache()
        found = self._system.find(self._path(folder))
        names = (PurePosixPath(path).relative_to(self._root).as_posix() for path in found)
        return sorted(name for name in names if not PurePosixPath(name).name.startswith(_TEMPORARY))

    def remove(self, name: str) -> int:
        """Take a file away; the bytes that it had, 0 if somebody else was faster."""
        try:
            size = int(self._system.size(self._path(name)) or 0)
            self._system.rm_file(self._path(name))
        except FileNotFoundError:
            return 0
        return size

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _create_here(self, path: Path, data: bytes) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                # Unlike a rename, a link does not take another file's place.
                os.link(fresh, path)
            except FileExistsError:
                return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(fresh).unlink()
        _sync_folder(path.parent)
        return True


def _sync_folder(folder: Path) -> None:
    """Have the folder's own entries on disk: a file's content alone does not survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
