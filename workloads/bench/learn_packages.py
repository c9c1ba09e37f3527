"""Debian packages as sources of text: got by apt from wherever this machine gets its packages, kept, checked, read."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from cluster.cache_folder import cache_folder
from cluster.errors import LearningError

_MAGIC: Final = b"!<arch>\n"
_SECONDS: Final = 600
"""For which a package is waited at most."""
_ANY_VERSION: Final = "`--any-version` takes the version that there is, and records it"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A package, and the one build of it that is meant."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Package:
    """A package's file that is there and is what it should be."""

    name: str
    version: str
    sha256: str
    file: Path


def fetched(
    wanted: Pinned, any_version: bool = False, progress: Callable[[str], None] = lambda text: None
) -> Package:
    """The package, downloaded unless it was before.

    With `any_version`, where the pinned build can't be had, the one that apt would install. LearningError if there is
    neither, or no apt.
    """
    kept = cache_folder() / "domains"
    file = kept / f"{wanted.name}_{wanted.version.replace(':', '%3a')}.deb"
    if _digest(file) == wanted.sha256:
        return Package(wanted.name, wanted.version, wanted.sha256, file)
    try:
        with _downloaded(f"{wanted.name}={wanted.version}", kept, wanted, progress) as fresh:
            if (digest := _digest(fresh)) != wanted.sha256:
                raise LearningError(
                    f"package {wanted.name} {wanted.version} is another build than the one that is pinned "
                    f"(SHA-256 {digest[:16]}…, not {wanted.sha256[:16]}…)",
                    _ANY_VERSION,
                )
            fresh.replace(file)
        return Package(wanted.name, wanted.version, wanted.sha256, file)
    except LearningError:
        if not any_version:
            raise
    with _downloaded(wanted.name, kept, wanted, progress) as fresh:
        version, digest = version_of(fresh), _digest(fresh)
        file = kept / f"{wanted.name}_{version.replace(':', '%3a')}_{digest[:16]}.deb"
        fresh.replace(file)
    return Package(wanted.name, version, digest, file)


@contextmanager
def _downloaded(what: str, kept: Path, wanted: Pinned, progress: Callable[[str], None]) -> Iterator[Path]:
    """What apt-get downloads, in a folder of its own that is gone afterwards."""
    by_hand = f"or put its file here: {kept / wanted.name}_{wanted.version.replace(':', '%3a')}.deb"
    if (apt := shutil.which("apt-get")) is None:
        raise LearningError(
            f"package {wanted.name} {wanted.version} can't be had: no apt-get here", by_hand[3:]
        )
    progress(f"downloading {what}")
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=kept) as folder:
            done = subprocess.run(
                [apt, "--quiet=2", "download", what],
                cwd=folder,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
            )
            files = sorted(Path(folder).glob("*.deb"))
            if done.returncode or len(files) != 1:
                said = [line[3:] for line in done.stderr.splitlines() if line.startswith("E: ")]
                raise LearningError(
                    f"package {what} can't be had: {said[0] if said else 'apt-get has none'}",
                    "; ".join(
                        ("`apt-get update` may help", *([_ANY_VERSION] if "=" in what else []), by_hand)
                    ),
                )
            yield files[0]
    except subprocess.TimeoutExpired as error:
        raise LearningError(f"package {what} did not come within {_SECONDS} s", by_hand[3:]) from error
    except OSError as error:
        raise LearningError(
            f"package {what} can't be kept in {kept}: {error.strerror}",
            "XDG_CACHE_HOME may name another folder",
        ) from error


def _digest(file: Path) -> str:
    """SHA-256 of a file; of one that can't be read, nothing."""
    try:
        with file.open("rb") as stream:
            whole = sha256()
            while block := stream.read(1 << 20):
                whole.update(block)
        return whole.hexdigest()
    except OSError:
        return ""


def version_of(file: Path) -> str:
    """The version that a package says it is."""
    for _, data in _files(file, "control.tar", lambda path: path == "control"):
        if found := re.search(r"^Version: *(\S+)", data.decode("utf-8", "replace"), re.M):
            return found[1]
    raise LearningError(f"{file} names no version", "delete it; it is downloaded again")


def files_in(file: Path, pattern: str) -> list[tuple[str, bytes]]:
    """The package's files whose paths match an expression, in the order of their paths.

    LearningError if it is no package, or is damaged.
    """
    return sorted(_files(file, "data.tar", lambda path: re.fullmatch(pattern, path) is not None))


def _files(file: Path, part: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    try:
        name, data = _part(file.read_bytes(), part)
        if name.endswith(".zst"):
            data = _without_zstd(file, part)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|*") as archive:
            for member in archive:
                path = member.name.removeprefix("./").lstrip("/")
                if member.isfile() and wanted(path) and (content := archive.extractfile(member)):
                    yield path, content.read()
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise LearningError(
            f"{file} is no Debian package, or is damaged", "delete it; it is downloaded again"
        ) from error


def _part(archive: bytes, wanted: str) -> tuple[str, bytes]:
    """A member of an `ar` archive by the beginning of its name. ValueError if it is not there, or not whole."""
    if not archive.startswith(_MAGIC):
        raise ValueError("no ar archive")
    at = len(_MAGIC)
    while at + 60 <= len(archive):
        name = archive[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        length = int(archive[at + 48 : at + 58])
        if name.startswith(wanted) and at + 60 + length <= len(archive):
            return name, archive[at + 60 : at + 60 + length]
        at += 60 + length + length % 2
    raise ValueError(f"no {wanted}")


def _without_zstd(file: Path, part: str) -> bytes:
    """Python 3.11 has no Zstandard; dpkg-deb has, where there is one."""
    if (dpkg := shutil.which("dpkg-deb")) is None:
        raise LearningError(f"{file} is packed with Zstandard", "install dpkg-deb, which unpacks it")
    flag = "--fsys-tarfile" if part == "data.tar" else "--ctrl-tarfile"
    done = subprocess.run([dpkg, flag, str(file)], capture_output=True)
    if done.returncode:
        raise ValueError("dpkg-deb can't read it")
    return done.stdout
