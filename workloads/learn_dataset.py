"""`expertmesh learn ingest` of datasets: files anywhere that fsspec reaches, read by Ray Data on a cluster's nodes.

What is read lies in Ray's object store, or on the nodes' disks where that is full, and comes from there by shards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import fsspec

from cluster.errors import LearningError
from cluster.learning.records import Record
from cluster.learning.text_files import LONGEST, SUFFIXES, pieces
from cluster.versions.files import Files

if TYPE_CHECKING:
    import pyarrow as pa

_TEXT: Final = "text"
_RAISED: Final = re.compile(r"(?:[\w.]*\.)?(\w+(?:Error|Exception|Invalid)): (.+)")
_WRAPPERS: Final = frozenset({"UserCodeException", "RayTaskError", "SystemException"})


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """Files of one file system, by how they are read."""

    url: str
    by_format: Mapping[str, Sequence[str]]
    """`parquet`, `json` or `text` → paths as the file system names them."""

    @property
    def count(self) -> int:
        """Of all formats."""
        return sum(map(len, self.by_format.values()))


def dataset_files(url: str, options: Mapping[str, Any]) -> DatasetFiles:
    """What is behind a URL or a path: a file, or all of a folder that could be text.

    LearningError if there is none. VersionError for a URL of a file system that is not installed.
    """
    if "://" not in url:
        url = str(Path(url).expanduser().absolute())
    # For its errors, which say what to install.
    Files(url, **options)
    system, root = fsspec.core.url_to_fs(url, **options)
    try:
        names = sorted(system.find(root))
    except OSError as error:
        raise LearningError(
            f"{url} can't be read: {str(error).splitlines()[0]}", "look at the address"
        ) from error
    found: dict[str, list[str]] = {}
    for name in names:
        relative = PurePosixPath(name).relative_to(PurePosixPath(root)) if name != root else PurePosixPath()
        hidden = any(part.startswith(".") for part in relative.parts)
        suffix = PurePosixPath(name).suffix
        if not hidden and (suffix in SUFFIXES or name == root):
            kind = {".parquet": "parquet", ".jsonl": "json"}.get(suffix, _TEXT)
            found.setdefault(kind, []).append(name)
    if not found:
        raise LearningError(f"no text files in {url}", f"their names end in {', '.join(SUFFIXES[1:])}")
    return DatasetFiles(url, found)


def read_dataset(files: DatasetFiles, options: Mapping[str, Any], column: str) -> Any:
    """The texts as samples with names, all of them read. Needs a connection to Ray.

    `column`: of Parquet and JSON lines. LearningError if a file can't be read, or has no such column.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    # Progress is shown by ours, and an error is told once.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        read = [
            _read(kind, paths, files.url, options, column) for kind, paths in sorted(files.by_format.items())
        ]
        dataset = read[0].union(*read[1:]) if len(read) > 1 else read[0]
        return dataset.map_batches(_cut, batch_format="pyarrow").materialize()
    except Exception as error:
        raise LearningError(
            f"{files.url} can't be read as a dataset: {_reason(error)}",
            f"text in UTF-8 is expected, of Parquet and JSON lines a column {column!r} (--column)",
        ) from error


def shards_of(
    dataset: Any, *, domain: str, consent: str, at: float, shard_records: int
) -> Iterator[list[Record]]:
    """The samples of what was read, so many at a time."""
    for batch in dataset.iter_batches(batch_size=shard_records, batch_format="pyarrow"):
        records = [
            Record("text", name, at, domain=domain, consent=consent, answer=text)
            for name, text in zip(batch["name"].to_pylist(), batch[_TEXT].to_pylist(), strict=True)
        ]
        if records:
            yield records


def _read(kind: str, paths: Sequence[str], url: str, options: Mapping[str, Any], column: str) -> Any:
    import ray.data

    file_system, _ = Files(url, **options).arrow()
    common: dict[str, Any] = {"filesystem": file_system, "file_extensions": None}
    if kind == "parquet":
        found = ray.data.read_parquet(list(paths), columns=[column], **common)
    elif kind == "json":
        found = ray.data.read_json(list(paths), lines=True, **common).select_columns([column])
    else:
        # Whole files: lines of one text belong together.
        return ray.data.read_binary_files(list(paths), **common).map_batches(_decoded, batch_format="pyarrow")
    return found if column == _TEXT else found.rename_columns({column: _TEXT})


def _decoded(batch: pa.Table) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {_TEXT: pa.array([data.decode("utf-8") for data in batch["bytes"].to_pylist()], pa.string())}
    )


def _cut(batch: pa.Table) -> pa.Table:
    """Texts as samples, each with its name."""
    import pyarrow as pa

    texts = batch[_TEXT].cast(pa.string()).drop_null().to_pylist()
    found = [piece for text in texts for piece in pieces(text, LONGEST)]
    names = [sha256(piece.encode("utf-8", "surrogatepass")).hexdigest()[:32] for piece in found]
    return pa.table({"name": pa.array(names, pa.string()), _TEXT: pa.array(found, pa.string())})


def _reason(error: BaseException) -> str:
    """What was raised in a task: it stands in the traceback's text, between Ray's own words about it."""
    said = [
        found[2]
        for line in str(error).splitlines()
        if (found := _RAISED.match(line.strip())) and found[1] not in _WRAPPERS
    ]
    return said[-1] if said else str(error).strip().splitlines()[0]
