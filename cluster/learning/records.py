"""What the stream is made of: one record for a request, a text, or what a user said of an answer.

Shards are Parquet files with these columns and nothing else, so that whatever reads Parquet reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from hashlib import sha256
from io import BytesIO
from typing import Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import LearningError

Kind = Literal["request", "text", "feedback"]
_KINDS: Final = frozenset({"request", "text", "feedback"})


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a shard."""

    kind: Kind
    id: str
    """Of the answer, or of the text: what feedback names."""
    at: float
    """Seconds since 1970."""
    key: str = ""
    """Whose it is, see `owner`; "" for the operator's own."""
    domain: str = ""
    manifest: str = ""
    """Of the version that answered."""
    consent: str = ""
    """On what ground it is kept, in the operator's words."""
    prompt: str = ""
    answer: str = ""
    """What was answered; of a text, all of it."""
    score: float | None = None
    """What a user said of an answer, 0 to 1."""
    context: str = ""
    """Of a request whose version was chosen by lot: what its chances depended on, see `cluster.contexts`."""
    propensity: float | None = None
    """Probability with which it got its version; None where that was not by lot."""

    @property
    def text(self) -> str:
        """All of it, as the model is to see it."""
        return self.prompt + self.answer


_NUMBERS: Final = frozenset({"at", "score", "propensity"})
# Columns that shards of before do not have.
_LATER: Final = frozenset({"context", "propensity"})
_SCHEMA: Final = pa.schema(
    [
        pa.field(field.name, pa.float64() if field.name in _NUMBERS else pa.string())
        for field in fields(Record)
    ]
)


def owner(api_key: str) -> str:
    """Under which name an API key's records are kept: a digest, so that the stream holds no keys."""
    return sha256(f"expertmesh stream:{api_key}".encode()).hexdigest()[:32]


def to_parquet(records: Sequence[Record]) -> bytes:
    """A shard's bytes."""
    columns = zip(*map(astuple, records), strict=True) if records else ((),) * len(_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    out = BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), out, compression="zstd")
    return out.getvalue()


def from_parquet(data: bytes, what: str) -> list[Record]:
    """The records of a shard; `what` names it in errors. LearningError if it is torn, or no shard."""
    try:
        # In this thread: of pyarrow's own some were seen to be left when a short command ended, which abort it then.
        file = pq.ParquetFile(BytesIO(data), pre_buffer=False)
        there = frozenset(file.schema_arrow.names)
        schema = pa.schema([field for field in _SCHEMA if field.name in there or field.name not in _LATER])
        table = file.read(columns=schema.names, use_threads=False).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise LearningError(
            f"{what} is no shard of the stream: {str(error).splitlines()[0]}", "take it away"
        ) from error
    found = [Record(**row) for row in table.to_pylist()]
    if unknown := {record.kind for record in found} - _KINDS:
        raise LearningError(f"{what} has records of an unknown kind: {min(unknown)}", "take it away")
    return found


def with_feedback(records: Iterable[Record]) -> list[Record]:
    """Requests and texts, each with the last that was said of it among these records."""
    kept: dict[str, Record] = {}
    said: dict[str, float | None] = {}
    for record in records:
        if record.kind == "feedback":
            said[record.id] = record.score
        else:
            kept[record.id] = record
    return [
        replace(record, score=said[record.id]) if record.id in said else record for record in kept.values()
    ]
