"""Bytes of files that are read where they lie: the tensors of a checkpoint, raw."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from cluster.errors import VersionError

_CHUNK_BYTES: Final = 1 << 24


class Span(NamedTuple):
    """Some bytes of a file."""

    file: Path
    start: int
    size: int


class OpenFiles:
    """Files that stay open for a block, since each is read many times."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, span: Span) -> bytes:
        """All of its bytes. VersionError if they are not there any more."""
        pieces, start, left = [], span.start, span.size
        while left:
            piece = self._piece(span.file, start, left)
            pieces.append(piece)
            start, left = start + len(piece), left - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def same(self, one: Span, other: Span) -> bool:
        """Whether both hold the same bytes; never more than some MiB of them are in memory."""
        if one.size != other.size:
            return False
        for offset in range(0, one.size, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, one.size - offset)
            if self.read(Span(one.file, one.start + offset, size)) != self.read(
                Span(other.file, other.start + offset, size)
            ):
                return False
        return True

    def _piece(self, file: Path, start: int, most: int) -> bytes:
        try:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            piece = os.pread(self._open[file], most, start)
        except OSError as error:
            raise VersionError(
                f"{file} can't be read: {error.strerror}", "see that it is there, and try again"
            ) from error
        if not piece:
            raise VersionError(f"{file} became shorter while it was read", "try again once it is whole")
        return piece
