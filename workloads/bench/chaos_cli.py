"""`expertmesh chaos list | run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from workloads.bench.command_parts import Check, JsonFile
from workloads.console import console

chaos_app = typer.Typer(help="Faults on purpose, and what clients see of them.", no_args_is_help=True)


@chaos_app.callback()
def _chaos() -> None:
    """Faults on purpose, and what clients see of them."""


@chaos_app.command("list")
def list_() -> None:
    """The scenarios that `run` knows by name."""
    from workloads.bench.chaos_scenario import load_scenario, shipped

    table = Table("scenario", "what happens")
    for name in shipped():
        table.add_row(name, load_scenario(name).description)
    console().print(table)


@chaos_app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Scenarios by name, or YAML files.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every scenario that is shipped.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each scenario.")] = 3,
    seed_base: Annotated[int, typer.Option(min=0, help="Seed of the first run; the others follow.")] = 0,
    json_: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a PNG here (default: beside the JSON file).")
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="No picture beside the JSON file.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    check: Check = False,
) -> None:
    """Serve, load, hurt, and measure what clients see; ends everything that it started."""
    from cluster.config import load_config
    from cluster.errors import ConfigError
    from workloads.bench.chaos_network import WAY_OUT, why_not
    from workloads.bench.chaos_plot import plot as draw
    from workloads.bench.chaos_scenario import load_scenario, shipped
    from workloads.plots import check_plot

    if bool(names) == all_:
        raise ConfigError(
            "give scenarios by name, or --all" if not names else "--all has every scenario already",
            f"shipped: {', '.join(shipped())}",
        )
    scenarios = [load_scenario(name) for name in dict.fromkeys(names or shipped())]
    doubles = [s.name for number, s in enumerate(scenarios) if s.name in {o.name for o in scenarios[:number]}]
    if doubles:
        raise ConfigError(f"two scenarios have the name {doubles[0]}", "rename one of the files")
    skipped = {s.name: why for s in scenarios if s.wants_namespaces and (why := why_not()) is not None}
    for scenario, reason in skipped.items():
        if not all_:
            raise ConfigError(f"scenario {scenario} can't be run here: {reason}", WAY_OUT)
    scenarios = [scenario for scenario in scenarios if scenario.name not in skipped]
    flags = {"model.path": model, "model.dtype": dtype}
    loaded = load_config(config, flags, os.environ, {"model.path": "--model", "model.dtype": "--dtype"})
    if plot is None and json_ not in (None, "-") and not no_plot:
        plot = Path(json_ or "").with_suffix(".png")
    # Told now, not after an hour of measuring.
    if json_ not in (None, "-") and not Path(json_ or "").parent.is_dir():
        raise ConfigError(f"--json {json_} can't be written: no such folder", "name a folder that exists")
    if plot is not None:
        check_plot(plot)

    from workloads.bench.chaos_mesh import own_cluster
    from workloads.bench.chaos_report import missed, report, show
    from workloads.bench.chaos_run import Measured, Model, measure
    from workloads.bench.chaos_server import steadfast
    from workloads.bench.report import now, write
    from workloads.logs import configure
    from workloads.progress import stages
    from workloads.serve import open_model

    own_cluster(loaded.config)
    configure("warning")
    err, started_at = Console(stderr=True), now()
    with stages(err) as progress:
        checkpoint, dtype_name, name = open_model(loaded.config, progress)
    base = loaded.config.model_copy(
        update={
            # The default model's folder is known from here on, and its dtype chosen: the server need not.
            "model": loaded.config.model.model_copy(
                update={"path": str(checkpoint.path), "dtype": dtype_name, "name": name}
            )
        }
    )
    served = Model(name, int(checkpoint.text_config["vocab_size"]))
    numbers = range(seed_base, seed_base + seeds)
    measured = Measured()

    def so_far(ended_early: str | None) -> dict[str, Any]:
        return report(
            scenarios,
            measured.runs,
            measured.fault_free,
            seed=seed_base,
            seeds=seeds,
            started_at=started_at,
            model=name,
            skipped=skipped,
            ended_early=ended_early,
        )

    def note(text: str) -> None:
        err.print(text, highlight=False, markup=False, soft_wrap=True)

    def keep() -> None:
        # Whatever ends this process, hours of measuring are not lost.
        if json_ not in (None, "-"):
            write(so_far("it has not ended yet"), json_ or "")

    try:
        with steadfast():
            measure(scenarios, numbers, base, served, note, measured, keep)
    except BaseException as error:  # Ctrl-C too
        if json_ not in (None, "-") and measured.runs:
            write(so_far(str(error) or type(error).__name__), json_ or "")
            note(f"{len(measured.runs)} runs until then are in {json_}")
        raise
    found = so_far(None)
    if json_:
        write(found, json_)
    if plot is not None:
        draw(found, plot)
    show(found, err if json_ == "-" else console())
    if check and missed(found):
        raise typer.Exit(1)
