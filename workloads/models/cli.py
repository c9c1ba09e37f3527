"""`expertmesh model upcycle | inspect | verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from workloads.console import console

model_app = typer.Typer(help="Make, look at and check model checkpoints.", no_args_is_help=True)
out = console()
err = Console(stderr=True)


@model_app.command()
def upcycle(
    source: Annotated[
        Path | None,
        typer.Argument(help="GGUF file or folder of a dense Llama-like model (default: the default model)."),
    ] = None,
    target: Annotated[Path | None, typer.Argument(help="Folder to make.")] = None,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the routers' weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32 on disk.")] = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace the target.")] = False,
) -> None:
    """Turn a dense model into a mixture of experts; without arguments make the default model."""
    from workloads.models.default_model import default_model
    from workloads.models.upcycle import upcycle as make
    from workloads.progress import stages

    if source is not None and target is None:
        raise typer.BadParameter("give the folder to make as well", param_hint="target")
    with stages(err) as progress:
        if source is None or target is None:
            path = default_model(progress=progress)
        else:
            path = make(
                source,
                target,
                experts=experts,
                top_k=top_k,
                seed=seed,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
            )
    out.print(str(path), highlight=False, soft_wrap=True)


@model_app.command()
def inspect(
    path: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder (default: the default model).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What a checkpoint is, from its headers alone."""
    from workloads.models.inspect import inspect_model

    report = inspect_model(_path(path))
    if json_:
        print(json.dumps(asdict(report), indent=2, default=str))
        return
    table = Table(show_header=False, box=None)
    for name, value in asdict(report).items():
        if name == "files":
            continue
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(name.replace("_", " "), text)
    table.add_row("files", str(len(report.files)))
    out.print(table)


@model_app.command()
def verify(
    path: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder (default: the default model).")
    ] = None,
    deep: Annotated[bool, typer.Option(help="Read every byte: digests, NaN and Inf.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check a checkpoint: every file there, whole and as its index, config and digests say."""
    from workloads.models.verify import verify_model
    from workloads.progress import stages

    with stages(err) as progress:
        report = verify_model(_path(path), deep=deep, progress=progress)
    if json_:
        print(json.dumps(asdict(report), indent=2, default=str))
    else:
        for problem in report.problems:
            out.print(f"[red]problem[/] {problem}", highlight=False, soft_wrap=True)
        for note in report.notes:
            out.print(f"note {note}", highlight=False, soft_wrap=True)
        size = report.weight_bytes / 2**20
        out.print(
            f"{report.path}: {report.files} files, {report.tensors} tensors, {size:.0f} MiB", highlight=False
        )
    if report.problems:
        raise typer.Exit(1)


def _path(path: Path | None) -> Path:
    from workloads.models.default_model import default_model

    return path if path is not None else default_model()
