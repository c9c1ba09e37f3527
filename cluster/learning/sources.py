"""Text files as records: what an operator adds to the stream by hand."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from cluster.learning.records import Record
from cluster.learning.text_files import LONGEST, pieces, texts_of


def records_of_file(file: Path, domain: str, consent: str, at: float) -> Iterator[Record]:
    """A file's samples: of *.jsonl the `text` of each line, of *.parquet its column `text`, else all of it.

    LearningError if it can't be read, or is no text.
    """
    for text in texts_of(file):
        for piece in pieces(text, LONGEST):
            name = sha256(piece.encode("utf-8", "surrogatepass")).hexdigest()[:32]
            yield Record("text", name, at, domain=domain, consent=consent, answer=piece)
