"""`expertmesh bench gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workloads.bench.cli import bench_app as bench_app
from workloads.bench.command_parts import Check, JsonFile, end, note


@bench_app.command()
def gpu(
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            help="kernels, roundtrip, tokens, serving, kill or mixed; repeat for several. All if none.",
        ),
    ] = None,
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            max=2,
            help="2: experts on another GPU than the engine's; roundtrip, tokens, serving and kill.",
        ),
    ] = 1,
    folder: Annotated[
        Path,
        typer.Option(help="Models of random weights are made there, 20 GB each; memory is fastest."),
    ] = Path("/dev/shm"),
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Routing trace (.npz) that says which experts are cold."
        ),
    ] = None,
    json_: JsonFile = None,
    check: Check = False,
) -> None:
    """Experts on a GPU: kernels, round trips and serving, beside stock vLLM on the same machine."""
    from workloads.bench.gpu import measure, show

    report = measure(part or None, folder, trace, note, gpus)
    end(report, json_, check, show)
