"""Small documents beside a loop's journal, each of one form that this version knows."""

from __future__ import annotations

from typing import Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from cluster.errors import LearningError
from cluster.versions.files import Files


class Formed(Protocol):
    """A document that says of which form it is."""

    @property
    def form(self) -> int: ...


_Document = TypeVar("_Document", bound=Formed)


def read_document(
    files: Files, name: str, kind: TypeAdapter[_Document], fresh: _Document, hint: str
) -> _Document:
    """What was written last, `fresh` if nothing was. LearningError if it is damaged (`hint`), or of another form."""
    if not files.has(name):
        return fresh
    where = f"{files.url}/{name}"
    try:
        found = kind.validate_json(files.read(name))
    except ValidationError as error:
        raise LearningError(f"{where} makes no sense: {str(error).splitlines()[0]}", hint) from error
    if found.form != fresh.form:
        raise LearningError(
            f"{where} is of form {found.form}, and this expertmesh knows {fresh.form}",
            "take the expertmesh that wrote it, or take the file away",
        )
    return found
