"""`expertmesh learn ...`: what the mesh learns from."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.config import Config, load_config
from cluster.errors import LearningError
from cluster.messages import StoreAddress
from workloads.console import console
from workloads.options import ConfigFile, Json, Model

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint
    from cluster.learning.records import Record
    from cluster.learning.stream import Stream
    from workloads.learn_workshop import Progress, Workshop

learn_app = typer.Typer(help="What the mesh learns from.", no_args_is_help=True)
out = console()
err = Console(stderr=True)

StreamUrl = Annotated[str | None, typer.Option("--stream", help="Folder or URL (default: learning.stream).")]
StoreUrl = Annotated[
    str | None, typer.Option("--store", help="Folder or URL of versions (default: versions.store).")
]
# Of one command instead of what learning.training says.
Reach = Annotated[
    float | None,
    typer.Option(help="Part of what is asked for more that the chosen experts make up, per layer."),
]
Steps = Annotated[int | None, typer.Option(help="Of training.")]
Rows = Annotated[int | None, typer.Option(help="Rows of a step.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a row.")]
Replay = Annotated[float | None, typer.Option(help="Share of rows of what is known.")]
Rate = Annotated[float | None, typer.Option(help="Largest learning rate.")]
Beta = Annotated[float | None, typer.Option(help="Weight of the pull towards the version before.")]
Workers = Annotated[int | None, typer.Option(help="Processes that train; 0: this one.")]


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
def experts(
    domain: Annotated[str, typer.Option(help="Domain of the stream that is to be learnt.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Domain that is known; may be repeated (default: all others).")
    ] = None,
    reach: Annotated[
        float, typer.Option(help="Part of what is asked for more that the chosen make up, per layer.")
    ] = 0.2,
    tokens: Annotated[int, typer.Option(min=1, help="Counted of each side at most.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of which texts are counted.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Write a heat map there.")] = None,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    json_: Json = False,
) -> None:
    """Which experts a domain of the stream is about: those that are to learn it, and those to be cloned first."""
    from actors.trainable_version import open_encoder, open_version
    from workloads.learn_experts import (
        as_json,
        as_table,
        domains_of,
        experts_for,
        plot,
        samples_for,
    )
    from workloads.plots import check_plot
    from workloads.progress import stages
    from workloads.serve import open_model

    settings = configured(config, model, stream)
    if png is not None:
        check_plot(png)
    found_domains = domains_of(open_stream(settings), settings.learning.holdout)
    samples = samples_for(found_domains, domain, against or ())
    with stages(err) as progress:
        checkpoint = open_model(settings, progress)[0]
        progress("loading the model", 0.0)
        trainable, encode = open_version(checkpoint), open_encoder(checkpoint)
        found = experts_for(
            trainable,
            encode,
            samples,
            reach=reach,
            tokens=tokens,
            seed=seed,
            progress=progress,
        )
    if png is not None:
        plot(found, png)
    if json_:
        print(json.dumps(as_json(found)))
        return
    out.print(as_table(found))
    out.print(
        f"{len(found.chosen)} of {found.experts} experts ({found.share:.1%}), by {found.tokens[0]} tokens of "
        f"{domain} and {found.tokens[1]} of {', '.join(found.against)}",
        highlight=False,
        soft_wrap=True,
    )


@learn_app.command()
def run(
    domain: Annotated[str, typer.Option(help="Domain of the stream that is to be learnt.")],
    against: Annotated[
        list[str] | None, typer.Option(help="Domain that is known; may be repeated (default: all others).")
    ] = None,
    reach: Reach = None,
    steps: Steps = None,
    rows: Rows = None,
    length: Length = None,
    replay: Replay = None,
    rate: Rate = None,
    beta: Beta = None,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Of all that is by lot.")] = 0,
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamUrl = None,
    store: StoreUrl = None,
    json_: Json = False,
) -> None:
    """Learn a domain of the stream: choose experts, train them, and publish what passes the gate."""
    from workloads.learn_run import learn, material_of, outcome_json, outcome_text
    from workloads.progress import stages
    from workloads.serve import open_model

    settings = configured(
        config,
        model,
        stream,
        store,
        reach=reach,
        steps=steps,
        rows=rows,
        length=length,
        replay=replay,
        rate=rate,
        beta=beta,
        workers=workers,
    )
    learning = settings.learning
    kept = open_stream(settings)
    material = material_of(kept, learning.holdout, domain, against or (), learning.gate.fewest)
    with stages(err) as progress:
        checkpoint = open_model(settings, progress)[0]
        with ray_for_training(settings):
            outcome = learn(workshop_of(settings, checkpoint, progress), material, seed)
    if json_:
        print(json.dumps(outcome_json(outcome)))
    else:
        out.print(outcome_text(outcome), highlight=False, soft_wrap=True)
    if not outcome.verdict.passed:
        raise typer.Exit(1)


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


def open_stream(config: Config) -> Stream:
    """The stream that is configured; of the configured model where it has no place of its own."""
    from cluster.learning.stream import Stream

    digest = ""
    if not config.learning.stream:
        from workloads.progress import stages
        from workloads.serve import open_model

        with stages(err) as progress:
            digest = open_model(config, progress)[0].digest
    return Stream(config.learning.url(digest), **config.learning.options)


def workshop_of(
    config: Config,
    checkpoint: Checkpoint,
    progress: Progress,
    pausing: Callable[[], bool] = lambda: False,
) -> Workshop:
    """Where the configured model learns."""
    from workloads.learn_workshop import Workshop
    from workloads.version_store import store_address

    state = StoreAddress(config.learning.state_url(checkpoint.digest), dict(config.learning.options))
    return Workshop(
        checkpoint,
        store_address(config, checkpoint),
        config.versions.alias,
        state,
        config.learning,
        getpass.getuser(),
        progress,
        pausing=pausing,
    )


@contextlib.contextmanager
def ray_for_training(config: Config) -> Iterator[None]:
    """Within the block there is a cluster for workers, if there are to be any."""
    from cluster.ray_cluster import connected

    with connected(config.ray) if config.learning.training.workers else contextlib.nullcontext():
        yield


def configured(
    file: Path | None,
    model: str | None,
    stream: str | None,
    store: str | None = None,
    **training: float | None,
) -> Config:
    """The configuration, with what a command's options say instead."""
    names = {"model.path": "--model", "learning.stream": "--stream", "versions.store": "--store"}
    flags = {"model.path": model, "learning.stream": stream, "versions.store": store}
    own = {f"learning.training.{name}": value for name, value in training.items()}
    return load_config(file, {**flags, **own}, os.environ, names).config


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
