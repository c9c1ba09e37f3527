"""Aliases: names for a manifest that move by compare-and-swap, on file systems that know nothing of it.

Every move is a file of its own with the next number. That a file of one name can be created only once is all that is
needed: of two who move the same alias from the same place one creates the next number, and the other is told. The files
are the alias's history as well. None is ever taken away, or its number could be created anew.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field, replace
from typing import Final

from pydantic import TypeAdapter

from cluster.errors import VersionConflictError, VersionError
from cluster.versions.files import Files

_FOLDER = "aliases"
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Move:
    """An alias came to point at a manifest."""

    number: int
    """1 for the alias's first."""
    manifest: str
    at: float
    """Seconds since 1970, by the clock of whoever moved it."""
    author: str = ""
    reason: str = ""
    token: str = field(default="", compare=False)
    """Random, given when it is made: tells one mover's move from another's that says the same."""


_MOVE: Final = TypeAdapter(Move)


class Aliases:
    """The aliases of a store."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def names(self) -> list[str]:
        """All aliases."""
        return sorted({name.split("/")[1] for name in self._files.names(_FOLDER)})

    def current(self, alias: str) -> Move | None:
        """Where it points; None before its first move."""
        names = self._files.names(f"{_FOLDER}/{_checked(alias)}")
        return _MOVE.validate_json(self._files.read(names[-1])) if names else None

    def history(self, alias: str, last: int | None = None) -> list[Move]:
        """All its moves, or the `last` so many of them, in order."""
        names = self._files.names(f"{_FOLDER}/{_checked(alias)}")
        shown = names if last is None else names[max(0, len(names) - last) :]
        return [_MOVE.validate_json(self._files.read(name)) for name in shown]

    def move(self, alias: str, move: Move) -> None:
        """Point it elsewhere; ``move.number`` must be the one after where the caller saw it.

        VersionError if somebody else has moved it meanwhile: nothing is changed then.
        """
        now = self.current(alias)
        if move.number != (now.number if now is not None else 0) + 1:
            raise _moved(alias)
        self._files.check_exclusive()
        name = f"{_FOLDER}/{alias}/{move.number:012}"
        data = _MOVE.dump_json(replace(move, token=uuid.uuid4().hex))
        # Object stores' clients try again when no answer came, and then find what they wrote at first.
        if not self._files.create(name, data) and self._files.read(name) != data:
            raise _moved(alias)


def _moved(alias: str) -> VersionConflictError:
    return VersionConflictError(
        f"alias {alias} was moved by somebody else meanwhile", "see where it points now, and try again"
    )


def _checked(alias: str) -> str:
    if not _NAME.fullmatch(alias):
        raise VersionError(
            f"{alias!r} is no name for an alias", "lower-case letters, digits and hyphens, such as production"
        )
    return alias
