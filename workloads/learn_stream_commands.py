"""`expertmesh learn ingest | stream | forget | expire`: what the mesh learns from."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.config import Config
from cluster.errors import LearningError
from workloads.console import err
from workloads.learn_parts import StreamUrl, configured, learn_app, open_stream, out
from workloads.options import ConfigFile, Json, Model

if TYPE_CHECKING:
    from cluster.learning.records import Record
    from cluster.learning.stream import Stream


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a stream holds."""

    stream: str
    shards: int
    last: int
    """The latest shard's number."""
    records: dict[str, dict[str, int]]
    """Domain → kind → how many."""
    held_out: int
    """Samples that are never learnt from."""
    owners: int
    oldest: float | None
    """Seconds since 1970."""
    newest: float | None


@learn_app.command()
def ingest(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Text files, *.jsonl or *.parquet with a `text`, folders of them, or URLs of any."
        ),
    ],
    domain: Annotated[str, typer.Option(help="What they are counted as.")],
    consent: Annotated[str, typer.Option(help="On what ground they are kept.")] = "operator",
    dataset: Annotated[
        bool, typer.Option("--dataset", help="Read by Ray Data, on all nodes; URLs always are.")
    ] = False,
    column: Annotated[str, typer.Option(help="Of datasets in Parquet or JSON lines.")] = "text",
    shard_records: Annotated[int, typer.Option(min=1, help="Records of one shard.")] = 4096,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    json_: Json = False,
) -> None:
    """Add texts to the stream."""
    if not domain.strip():
        raise LearningError("the domain has no name", "such as --domain law")
    settings = configured(config, model, stream)
    if dataset or any("://" in path for path in paths):
        count, shards = _datasets(settings, paths, column, domain, consent, shard_records)
    else:
        if column != "text":
            raise LearningError("--column is of datasets", "add --dataset")
        count, shards = _files(settings, paths, domain, consent, shard_records)
    kept = open_stream(settings)
    numbers, records = [], 0
    with contextlib.closing(shards):
        for shard in shards:
            numbers.append(kept.append(shard))
            records += len(shard)
    if not records:
        raise LearningError(f"{count} files hold no text", "give some that do")
    if json_:
        print(json.dumps({"stream": kept.url, "files": count, "records": records, "shards": numbers}))
    else:
        out.print(
            f"{records} texts of {count} files are in {kept.url}, shards {numbers[0]} to {numbers[-1]}",
            highlight=False,
            soft_wrap=True,
        )


def _files(
    settings: Config, paths: Sequence[str], domain: str, consent: str, shard_records: int
) -> tuple[int, Generator[list[Record]]]:
    """How many files, and their texts as shards."""
    from cluster.learning.sources import records_of_file
    from cluster.learning.text_files import files_of
    from workloads.progress import stages

    files = files_of([Path(path).expanduser() for path in paths])
    at = time.time()
    records: list[Record] = []
    # All of them before anything is written: one that can't be read leaves the stream as it was.
    with stages(err) as progress:
        for number, file in enumerate(files, 1):
            records += records_of_file(file, domain, consent, at)
            progress(f"reading {len(files)} files", number / len(files))
    return len(files), (
        records[start : start + shard_records] for start in range(0, len(records), shard_records)
    )


def _datasets(
    settings: Config, paths: Sequence[str], column: str, domain: str, consent: str, shard_records: int
) -> tuple[int, Generator[list[Record]]]:
    """The same of datasets, on the configured cluster."""
    from workloads.learn_dataset import dataset_files, read_dataset, shards_of

    options = dict(settings.learning.options)
    found = [dataset_files(path, options if "://" in path else {}) for path in paths]

    def shards() -> Generator[list[Record]]:
        from cluster.ray_cluster import connected

        with connected(settings.ray):
            # All of them before anything is written, as above.
            read = [read_dataset(files, options if "://" in files.url else {}, column) for files in found]
            for dataset in read:
                yield from shards_of(
                    dataset, domain=domain, consent=consent, at=time.time(), shard_records=shard_records
                )

    return sum(files.count for files in found), shards()


@learn_app.command("stream")
def stream_(
    config: ConfigFile = None, model: Model = None, stream: StreamUrl = None, json_: Json = False
) -> None:
    """What the stream holds."""
    settings = configured(config, model, stream)
    found = state_of(open_stream(settings), settings.learning.holdout)
    if json_:
        print(json.dumps(asdict(found), indent=2))
        return
    table = Table("domain", "requests", "texts", "feedback")
    for domain, kinds in sorted(found.records.items()):
        table.add_row(domain, *(str(kinds.get(kind, 0)) for kind in ("request", "text", "feedback")))
    out.print(
        f"{found.stream}: {found.shards} shards, the latest is {found.last}; "
        f"{found.held_out} samples are held out; {found.owners} owners"
        + (f"; from {_when(found.oldest)} to {_when(found.newest)}" if found.oldest and found.newest else ""),
        highlight=False,
        soft_wrap=True,
    )
    out.print(table)


@learn_app.command()
def forget(
    key: Annotated[
        str,
        typer.Option(
            envvar="EXPERTMESH_FORGET_KEY", prompt=True, hide_input=True, help="API key whose records go."
        ),
    ],
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
) -> None:
    """Take all that was kept of one API key's requests, and what was said of them, out of the stream and of replay."""
    from cluster.learning.journal import forget as forget_replayed
    from cluster.learning.records import owner
    from cluster.versions.files import Files

    if not key.strip():
        raise LearningError("the key is empty", "give the API key whose records are to go")
    settings = configured(config, model, stream)
    kept = open_stream(settings)
    count = kept.forget(owner(key.strip()))
    replayed = sum(
        forget_replayed(Files(url, **settings.learning.options), owner(key.strip()))
        for url in settings.learning.state_urls()
    )
    out.print(
        f"{count} records taken out of {kept.url}, {replayed} samples out of what is replayed",
        highlight=False,
        soft_wrap=True,
    )


@learn_app.command()
def expire(config: ConfigFile = None, model: Model = None, stream: StreamUrl = None) -> None:
    """Take shards out of the stream that are older than learning.retention; routers do so as well."""
    settings = configured(config, model, stream)
    kept = open_stream(settings)
    count = kept.expire(time.time() - settings.learning.retention)
    out.print(f"{count} shards taken out of {kept.url}", highlight=False, soft_wrap=True)


def state_of(stream: Stream, holdout: float) -> StreamState:
    """What a stream holds. LearningError if one of its shards is damaged."""
    from cluster.learning.split import holdout_of

    records: dict[str, Counter[str]] = {}
    owners: set[str] = set()
    times: list[float] = []
    held_out, numbers = 0, stream.numbers()
    for _, shard in stream.after(0):
        for record in shard:
            records.setdefault(record.domain, Counter())[record.kind] += 1
            owners |= {record.key} - {""}
            times.append(record.at)
            if record.kind != "feedback" and holdout and holdout_of(record.text, holdout, 1) is not None:
                held_out += 1
    return StreamState(
        stream.url,
        len(numbers),
        max(numbers, default=0),
        {domain: dict(kinds) for domain, kinds in records.items()},
        held_out,
        len(owners),
        min(times, default=None),
        max(times, default=None),
    )


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
