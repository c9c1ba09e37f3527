"""`expertmesh bench domains | learn | learn-live`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from workloads.bench.command_parts import (
    Check,
    ConfigFile,
    Hosts,
    JsonFile,
    Model,
    Seed,
    end,
    note,
    own_server,
)
from workloads.bench.placement_cli import bench_app as bench_app


@bench_app.command()
def domains(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Each domain becomes a folder in it.")],
    only: Annotated[
        list[str] | None, typer.Option("--domain", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option("--bytes", min=1, help="Bytes of a domain at most.")] = 4 * 2**20,
    any_version: Annotated[
        bool,
        typer.Option("--any-version", help="Where a pinned package can't be had, take the one there is."),
    ] = False,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Small domains of what every Python has, without packages.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Make folders of text of different kinds, to learn one after the other, of Debian packages."""
    from workloads.bench.learn_domains import make, make_builtin, show
    from workloads.console import console

    names = tuple(only or ())
    if builtin:
        made = make_builtin(folder, names, limit=limit, seed=seed)
    else:
        made = make(folder, names, limit=limit, seed=seed, any_version=any_version, progress=note)
    show(made, folder, console())


@bench_app.command()
def learn(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="More domains, after those of --domains.")
    ] = None,
    domains: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR...",
            help="Folders of text, learnt in this order; one named `general` is the set on which nothing may be lost "
            "(default: small built-in domains).",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder (default: a small model, trained first on general text)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in a process.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this one; may be repeated (default: all).")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="For each domain.")] = 150,
    rows: Annotated[int, typer.Option(min=4, help="Of a step.")] = 8,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a row.")] = 256,
    replay: Annotated[float, typer.Option(min=0.1, max=0.25, help="Share of rows of what is known.")] = 0.25,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, few and short steps: within 15 minutes on 2 cores.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the matrices and the curves there.")] = None,
    json_: JsonFile = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """Learn a stream of domains in every way that is compared, and what each remembers of them."""
    from workloads.bench.learn import measure, settings_for, show
    from workloads.plots import check_plot
    from workloads.progress import stages

    if png is not None:
        check_plot(png)
    settings = settings_for(
        [*(domains or ()), *(folders or ())],
        model=model,
        device=device,
        jobs=jobs,
        seeds=seeds,
        seed=seed,
        methods=tuple(method or ()),
        steps=steps,
        rows=rows,
        length=length,
        replay=replay,
        quick=quick,
    )
    err = Console(stderr=True)
    with stages(err) as progress:
        report = measure(settings, progress)
    if png is not None:
        from workloads.bench.learn_plot import plot

        plot(report, png)
    end(report, json_, check, show)


@bench_app.command(name="learn-live")
def learn_live(
    json_: JsonFile = None,
    config: ConfigFile = None,
    model: Model = None,
    hosts: Hosts = None,
    domain: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of text to learn (default: a built-in domain).")
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of text that is known (default: a built-in one)."),
    ] = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """How long a text in the stream takes to be a version that serves, under light load, and what it is worth."""
    from workloads.bench.chaos_server import steadfast
    from workloads.bench.learn_builtin import builtin_domains
    from workloads.bench.learn_live import measure, show
    from workloads.bench.learn_text import read_domain

    builtin = {} if domain and general else builtin_domains()
    name, found = read_domain(domain) if domain else ("unicode", builtin["unicode"])
    texts = {name: found, "general": read_domain(general)[1] if general else builtin["general"]}
    loaded, _, served = own_server(config, model, hosts)
    with steadfast():
        report = measure(loaded, served, texts, seed, note)
    end(report, json_, check, show)
