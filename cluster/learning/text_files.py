"""Text files and what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cluster.errors import LearningError

LONGEST: Final = 8000
"""Characters of one sample; longer texts are divided between paragraphs, or lines, or anywhere."""
SUFFIXES: Final = ("", ".txt", ".md", ".rst", ".py", ".text", ".jsonl", ".parquet")


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files that are meant, in order: all those in a folder that could be text.

    LearningError for a path that is not there, and if there is none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in SUFFIXES]
            found += [
                p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)
            ]
        elif path.exists():
            found.append(path)
        else:
            raise LearningError(f"no such file or folder: {path}", "give text files, or folders with some")
    if not found:
        raise LearningError(
            f"no text files in {', '.join(map(str, paths))}", f"their names end in {', '.join(SUFFIXES[1:])}"
        )
    return found


def pieces(text: str, longest: int) -> Iterator[str]:
    """A text in pieces of at most so many characters, which together are the text but for white space between them."""
    rest = text.strip()
    while len(rest) > longest:
        cut = max((rest.rfind(mark, 1, longest) for mark in ("\n\n",)), default=-1)
        for mark in ("\n", " "):
            if cut < longest // 4:
                cut = max(cut, rest.rfind(mark, 1, longest))
        if cut < 1:
            cut = longest
        piece = rest[:cut].rstrip()
        if piece:
            yield piece
        rest = rest[cut:].lstrip()
    if rest:
        yield rest


def texts_of(file: Path) -> Iterator[str]:
    """Of *.jsonl the `text` of each line, of *.parquet its column `text`, else all of it.

    LearningError if it can't be read, or is no text.
    """
    try:
        if file.suffix == ".parquet":
            yield from _of_parquet(file)
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _of_line(line, f"{file}:{number}")
        else:
            yield file.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise LearningError(f"{file} can't be read: {reason}", "text in UTF-8 is expected") from error


def _of_line(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise LearningError(f"{where} is no JSON object with a text", 'such as {"text": "..."}') from error
    if not isinstance(text, str):
        raise LearningError(f"{where}: text is no text", 'such as {"text": "..."}')
    return text


def _of_parquet(file: Path) -> Iterator[str]:
    # Which is a tenth of a second to import, and not there where models are only measured.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # In this thread: those of pyarrow's own may abort a short command as it ends.
        table = pq.ParquetFile(file, pre_buffer=False).read(columns=["text"], use_threads=False)
        if "text" not in table.column_names:
            raise ValueError("it has no column text")
        column = table.column("text").cast(pa.string())
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    yield from column.drop_null().to_pylist()
