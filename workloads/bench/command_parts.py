"""What the commands of `expertmesh bench` have in common: options, a server of their own, and how they end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint
    from cluster.config import Config
    from workloads.bench.chaos_run import Model as ServedModel

JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the report here; - for standard output.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Check = Annotated[bool, typer.Option("--check", help="End with code 1 if a bar is missed.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")]
Hosts = Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts.")]


def own_server(
    config: Path | None, model: str | None, hosts: int | None, dtype: str | None = None
) -> tuple[Config, Checkpoint, ServedModel]:
    """What a measurement serves on a cluster of its own. ConfigError where the configuration names another."""
    from cluster.config import load_config
    from workloads.bench.chaos_mesh import own_cluster
    from workloads.bench.chaos_run import Model as ServedModel
    from workloads.logs import configure
    from workloads.progress import stages
    from workloads.serve import open_model

    flags = {"model.path": model, "hosts.0.count": hosts, "model.dtype": dtype}
    names = {"model.path": "--model", "hosts.0.count": "--hosts", "model.dtype": "--dtype"}
    loaded = load_config(config, flags, os.environ, names).config
    own_cluster(loaded)
    configure("warning")
    with stages(Console(stderr=True)) as progress:
        checkpoint, served_dtype, name = open_model(loaded, progress)
    given = {"path": str(checkpoint.path), "dtype": served_dtype, "name": name}
    loaded = loaded.model_copy(update={"model": loaded.model.model_copy(update=given)})
    return loaded, checkpoint, ServedModel(name, int(checkpoint.text_config["vocab_size"]))


def note(text: str) -> None:
    Console(stderr=True).print(text, highlight=False)


def end(
    report: dict[str, Any],
    json_: str | None,
    check: bool,
    show: Callable[[dict[str, Any], Console], None],
) -> None:
    """Write the report, show it, and end with code 1 if a bar is missed that was to be met."""
    from workloads.bench.report import write
    from workloads.console import console

    if json_:
        write(report, json_)
    show(report, Console(stderr=True) if json_ == "-" else console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)
