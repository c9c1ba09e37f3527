"""What the commands of `expertmesh learn` have in common: options, and what they open."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.config import Config, load_config
from cluster.messages import StoreAddress
from workloads.console import console, err

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint
    from cluster.learning.stream import Stream
    from workloads.learn_workshop import Progress, Workshop

learn_app = typer.Typer(help="What the mesh learns from.", no_args_is_help=True)
out = console()

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
Beta = Annotated[
    float | None, typer.Option(help="Weight of the pull towards the version before, on new rows.")
]
Workers = Annotated[int | None, typer.Option(help="Processes that train; 0: this one.")]


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
