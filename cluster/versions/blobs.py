"""Blobs: immutable bytes named by their sha256, so that the same expert in two versions exists once."""

from __future__ import annotations

from hashlib import sha256

from cluster.errors import VersionError
from cluster.versions.files import Files

_FOLDER = "blobs"


class Blobs:
    """The blobs of a store."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def put(self, data: bytes) -> tuple[str, bool]:
        """Keep these bytes; their digest, and whether they are new here."""
        digest = sha256(data).hexdigest()
        # Asked before, since a server is sent all of it before it says no.
        new = not self.has(digest) and self._files.create(_name(digest), data)
        if not new:
            # It may be damaged, or be taken for garbage: nobody need have named it for long.
            self._files.renew(_name(digest), data)
        return digest, new

    def get(self, digest: str) -> bytes:
        """The bytes, once they have proved to be those. VersionError if they are missing or damaged."""
        data = self._files.read(_name(digest))
        found = sha256(data).hexdigest()
        if found != digest:
            raise VersionError(
                f"blob {digest[:12]} of {self._files.url} is damaged: its content has sha256 {found[:12]}",
                "publish the version again that it is of; the one that runs is not touched",
            )
        return data

    def has(self, digest: str) -> bool:
        """Whether it is there; its content is not looked at."""
        return self._files.has(_name(digest))

    def all(self) -> set[str]:
        """Digests of all blobs."""
        return {name.rpartition("/")[2] for name in self._files.names(_FOLDER)}

    def modified(self, digest: str) -> float | None:
        """See `Files.modified`."""
        return self._files.modified(_name(digest))

    def size(self, digest: str) -> int:
        """Bytes of the blob; 0 if there is none."""
        return self._files.size(_name(digest))

    def remove(self, digest: str) -> int:
        """Take it away; the bytes that it had."""
        return self._files.remove(_name(digest))


def _name(digest: str) -> str:
    # Folders of a few hundred entries each, for file systems that are slow with many.
    return f"{_FOLDER}/{digest[:2]}/{digest}"
