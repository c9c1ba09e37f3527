"""A folder of files that are written once: on this machine's disk, or on any object store that fsspec knows."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import StoreError, VersionError

_TEMPORARY = ".writing-"


class Files:
    """Names are relative to the folder, with slashes."""

    def __init__(self, url: str, **options: Any) -> None:
        """`options` are the file system's own, such as ``endpoint_url`` of an S3-compatible server.

        VersionError if the URL can't be made sense of, or the file system's package is not installed.
        """
        try:
            self._system, root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, TypeError, ImportError) as error:
            raise VersionError(
                f"the store {url} can't be opened: {error}",
                "give a folder, or a URL whose fsspec package is installed "
                "(s3:// needs s3fs: pip install 'expertmesh[s3]'; gs:// needs gcsfs)",
            ) from error
        self.url = url
        self._root = root.rstrip("/")
        self._local = isinstance(self._system, LocalFileSystem)
        self._exclusive = self._local

    def create(self, name: str, data: bytes) -> bool:
        """Write a file, whole and on disk when this returns; False if there is one of that name, which stays.

        VersionError if it can't be written: the disk is full, say. Nothing of it is left then.
        """
        with self._writing(name):
            try:
                if self._local:
                    # Unlike a rename, a link does not take another file's place.
                    self._write_here(Path(self._path(name)), data, os.link)
                else:
                    self._system.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError:
                # Not every package says of a condition that is not met what it is.
                if self._local or not self.has(name):
                    raise
                return False
            return True

    def renew(self, name: str, data: bytes) -> None:
        """Have a file with these bytes that counts as written just now, in place of any that was there.

        VersionError if it can't be written.
        """
        with self._writing(name):
            if not self._local:
                self._system.pipe_file(self._path(name), data, mode="overwrite")
                return
            path = Path(self._path(name))
            with contextlib.suppress(FileNotFoundError):
                if path.read_bytes() == data:
                    os.utime(path)
                    return
            self._write_here(path, data, os.replace)

    def check_exclusive(self) -> None:
        """VersionError if two could create the same name: some servers ignore the condition that they are sent.

        It is tried out, once, unless the folder is on a disk.
        """
        if self._exclusive:
            return
        name = f"probes/{uuid.uuid4().hex}"
        made = [self.create(name, b"") for _ in range(2)]
        self.remove(name)
        if made != [True, False]:
            raise VersionError(
                f"{self.url} lets a name be written twice, so that versions could be lost",
                "take an object store that heeds If-None-Match, as S3 does, or a folder",
            )
        self._exclusive = True

    def read(self, name: str) -> bytes:
        """VersionError if there is no such file, or it can't be read."""
        with self._reading(name):
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError as error:
                raise VersionError(f"{self.url} has no {name}", "see `expertmesh versions list`") from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._about(name).get("type") == "file"

    def size(self, name: str) -> int:
        """Bytes of a file; 0 if there is none."""
        return int(self._about(name).get("size") or 0)

    def modified(self, name: str) -> float | None:
        """When it was written, in seconds since 1970 by the store's clock.

        None if there is no such file, or the file system can't tell.
        """
        with self._reading(name):
            self._system.invalidate_cache()
            try:
                return float(self._system.modified(self._path(name)).timestamp())
            except (FileNotFoundError, NotImplementedError):
                return None

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder and below it, sorted; none if there is no such folder."""
        with self._reading(folder):
            # Object stores are listed anew: others write there too.
            self._system.invalidate_cache()
            found = self._system.find(self._path(folder))
        names = (PurePosixPath(path).relative_to(self._root).as_posix() for path in found)
        return sorted(name for name in names if not PurePosixPath(name).name.startswith(_TEMPORARY))

    def unfinished(self, before: float) -> list[str]:
        """Names of what writers that were killed left on this machine's disk, last written before that time."""
        if not self._local:
            return []
        found = []
        for path in Path(self._root).rglob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    found.append(path.relative_to(self._root).as_posix())
        return sorted(found)

    def remove(self, name: str) -> int:
        """Take a file away; the bytes that it had, 0 if somebody else was faster."""
        size = self.size(name)
        with self._writing(name):
            try:
                self._system.rm_file(self._path(name))
            except FileNotFoundError:
                return 0
        return size

    def arrow(self) -> tuple[Any, str]:
        """The folder for what knows pyarrow alone: its file system (None: this machine's disks), and the path there."""
        if self._local:
            return None, self._root
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self._system)), self._root

    def remove_folder(self, name: str) -> None:
        """Take a folder away with all that is in it, if it is there."""
        with self._writing(name), contextlib.suppress(FileNotFoundError):
            self._system.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _about(self, name: str) -> dict[str, Any]:
        with self._reading(name):
            self._system.invalidate_cache()
            try:
                return dict(self._system.info(self._path(name)))
            except FileNotFoundError:
                return {}

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        with self._telling(
            f"{name} can't be written to {self.url}",
            "make room, or see who may write there; nothing was changed",
        ):
            yield

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        with self._telling(f"{name} can't be read from {self.url}", "see whether the store is there"):
            yield

    @contextlib.contextmanager
    def _telling(self, what: str, way_out: str) -> Iterator[None]:
        try:
            yield
        except VersionError:
            raise
        except Exception as error:
            # Object stores raise what their packages raise, such as botocore's for a server that is out of reach.
            if self._local and not isinstance(error, OSError):
                raise
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(f"{what}: {said}", way_out) from error

    def _write_here(self, path: Path, data: bytes, place: Callable[[str, Path], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            place(fresh, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(fresh).unlink()
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have the folder's own entries on disk: a file's content alone does not survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
