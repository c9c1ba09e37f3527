"""`expertmesh bench dispatch | hot-path | prediction | swap | canary | serve | replicas | placement | solver |
domains`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint
    from cluster.config import Config
    from workloads.bench.chaos_run import Model

bench_app = typer.Typer(help="Measurements; each can write one JSON object.", no_args_is_help=True)

JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the report here; - for standard output.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
_METHODS = ("ours", "eplb", "round_robin", "random")
_Number = TypeVar("_Number", int, float)
Check = Annotated[bool, typer.Option("--check", help="End with code 1 if a bar is missed.")]


@bench_app.callback()
def _bench() -> None:
    """Measurements."""


@bench_app.command()
def dispatch(
    json_: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every path at each size.")] = 40,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Measure Ray's own calls beside.")] = True,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """The round trip to the expert hosts, beside what else could carry it."""
    from workloads.bench.dispatch import Settings, measure, show
    from workloads.bench.report import write

    err = Console(stderr=True)
    # Plain lines: a spinner's thread would wake up in the middle of what is measured.
    report = measure(
        Settings(rounds, ray, seed), lambda size: err.print(f"measuring {size}", highlight=False)
    )
    if json_:
        write(report, json_)
    show(report, err if json_ == "-" else Console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


@bench_app.command(name="hot-path")
def hot_path(json_: JsonFile = None, seed: Seed = 0, check: Check = False) -> None:
    """What counting choices and splitting rows over replicas adds to every layer of every step."""
    from workloads.bench.hot_path import measure, show
    from workloads.bench.report import write
    from workloads.console import console

    report = measure(seed)
    if json_:
        write(report, json_)
    show(report, Console(stderr=True) if json_ == "-" else console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


@bench_app.command()
def prediction(
    json_: JsonFile = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts.")] = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """How far the planner's predictions are from what dispatches take, on a running mesh."""
    from workloads.bench.chaos_server import steadfast
    from workloads.bench.prediction import measure, show

    loaded, _, served = _own_server(config, model, hosts)
    with steadfast():
        report = measure(loaded, served, seed, _note)
    _end(report, json_, check, show)


@bench_app.command()
def swap(
    json_: JsonFile = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts.")] = None,
    cycles: Annotated[int, typer.Option(min=2, help="Promotions, and as many rollbacks.")] = 100,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """A version published, staged, and promoted and rolled back again and again under load."""
    from workloads.bench.chaos_server import steadfast
    from workloads.bench.swap import measure, show

    # Tokens are compared one by one.
    loaded, checkpoint, served = _own_server(config, model, hosts, dtype="float32")
    with steadfast():
        report = measure(loaded, checkpoint, served, cycles, seed, _note)
    _end(report, json_, check, show)


@bench_app.command()
def canary(
    json_: JsonFile = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Trials of the version that is as good.")] = 20,
    seconds: Annotated[float, typer.Option(min=1, help="How long each of them lasts at most.")] = 30.0,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """A bad version on trial, and one that is as good, again and again: what the trial makes of them."""
    from workloads.bench.canary import measure, show
    from workloads.bench.chaos_server import steadfast

    loaded, checkpoint, served = _own_server(config, model, hosts, dtype="float32")
    with steadfast():
        report = measure(loaded, checkpoint, served, runs, seconds, seed, _note)
    _end(report, json_, check, show)


@bench_app.command()
def serve(
    json_: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both servers at each concurrency.")] = 6,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 48,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the mesh's server.")] = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """Throughput and latency of the mesh beside stock vLLM, in turn in one run."""
    from cluster.config import load_config
    from workloads.bench.report import write
    from workloads.bench.serve import measure, show
    from workloads.logs import configure
    from workloads.progress import stages

    flags = {"model.path": model, "model.dtype": dtype, "hosts.0.count": hosts, "server.port": port}
    names = {"model.path": "--model", "model.dtype": "--dtype", "hosts.0.count": "--hosts"}
    loaded = load_config(config, flags, os.environ, names)
    configure("warning")
    err = Console(stderr=True)
    with stages(err) as progress:
        report = measure(loaded.config, rounds, seed, tokens, progress)
    if json_:
        write(report, json_)
    show(report, err if json_ == "-" else Console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


@bench_app.command()
def replicas(
    json_: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both servers at each concurrency.")] = 10,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens per answer.")] = 48,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65534, help="Port of the first server; the other has the next (default: free ones)."
        ),
    ] = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """What a second replica of every expert costs while nothing fails: one and two of them, asked in turn."""
    from cluster.config import load_config
    from cluster.errors import ConfigError

    flags = {"model.path": model, "model.dtype": dtype}
    loaded = load_config(config, flags, os.environ, {"model.path": "--model", "model.dtype": "--dtype"})
    # Told now, not after minutes of measuring.
    if json_ not in (None, "-") and not Path(json_ or "").parent.is_dir():
        raise ConfigError(f"--json {json_} can't be written: no such folder", "name a folder that exists")

    from workloads.bench.chaos_server import steadfast
    from workloads.bench.replicas import Settings, check_comparable, measure, opened, show
    from workloads.bench.report import write
    from workloads.console import console
    from workloads.logs import configure
    from workloads.progress import stages

    check_comparable(loaded.config)
    configure("warning")
    err = Console(stderr=True)
    with stages(err) as progress:
        served = opened(loaded.config, progress)
    # Plain lines: a spinner's thread would wake up in the middle of what is measured.
    with steadfast():
        report = measure(
            served,
            Settings(rounds, tokens, seed, port),
            lambda text: err.print(text, highlight=False, markup=False),
        )
    if json_:
        write(report, json_)
    show(report, err if json_ == "-" else console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


@bench_app.command()
def placement(
    trace: Annotated[Path, typer.Option("--trace", metavar="FILE", help="Routing trace (.npz, expert_ids).")],
    shift_to: Annotated[
        Path | None, typer.Option("--shift-to", metavar="FILE", help="Another task's trace, to shift to.")
    ] = None,
    hosts: Annotated[str, typer.Option(help="Numbers of equal hosts.")] = "8,16,32",
    redundancy: Annotated[
        str, typer.Option(help="Copies of a layer's experts, over their number.")
    ] = "1,1.125,1.25,1.5",
    fleet: Annotated[
        Path | None, typer.Option("--fleet", metavar="FILE", help="Unequal hosts, described in YAML.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", metavar="FILE", help="Requests (.jsonl, .jsonl.gz) to replay."),
    ] = None,
    number: Annotated[int, typer.Option("--number", min=1, help="Of them, the first so many.")] = 500,
    rate: Annotated[float, typer.Option(min=0.001, help="They come so many times as fast.")] = 1.0,
    layers: Annotated[int | None, typer.Option(min=1, help="Scale the trace to so many layers.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Scale it to so many experts a layer.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 256,
    tries: Annotated[int, typer.Option(min=0, help="Moves of a layer that the search looks at.")] = 6000,
    methods: Annotated[str, typer.Option(help="What is compared.")] = ",".join(_METHODS),
    json_: JsonFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG.")] = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """Where experts go, on real routing: the planner beside EPLB, round-robin and random."""
    from workloads.bench.placement import Settings, measure, show
    from workloads.bench.placement_plot import plot as draw
    from workloads.bench.report import write
    from workloads.console import console
    from workloads.plots import check_plot

    settings = Settings(
        trace=trace,
        shift_to=shift_to,
        fleet=fleet,
        requests=requests,
        number=number,
        rate=rate,
        layers=layers,
        experts=experts,
        hosts=_numbers("--hosts", hosts, int),
        redundancies=_numbers("--redundancy", redundancy, float),
        batch=batch,
        tries=tries,
        methods=_methods(methods),
        seed=seed,
    )
    if plot is not None:
        check_plot(plot)
    err = Console(stderr=True)
    report, planned = measure(settings, lambda text: err.print(text, highlight=False, markup=False))
    if json_:
        write(report, json_)
    if plot is not None:
        draw(report, planned, plot)
    show(report, err if json_ == "-" else console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


@bench_app.command()
def solver(
    seeds: Annotated[int, typer.Option(min=1, help="Random layers of each size.")] = 3,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that HiGHS has for a layer.")] = 60.0,
    json_: JsonFile = None,
    check: Check = False,
) -> None:
    """The planner's search beside HiGHS's mixed-integer solver, on layers of growing size."""
    from workloads.bench.report import write
    from workloads.bench.solver import measure, show
    from workloads.console import console

    err = Console(stderr=True)
    report = measure(seeds, limit, lambda text: err.print(text, highlight=False, markup=False))
    if json_:
        write(report, json_)
    show(report, err if json_ == "-" else console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


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
        made = make(folder, names, limit=limit, seed=seed, any_version=any_version, progress=_note)
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
    from workloads.bench.report import write
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
    if json_:
        write(report, json_)
    if png is not None:
        from workloads.bench.learn_plot import plot

        plot(report, png)
    show(report, err if json_ == "-" else Console())
    if check and any(bar["met"] is False for bar in report["bars"].values()):
        raise typer.Exit(1)


@bench_app.command(name="learn-live")
def learn_live(
    json_: JsonFile = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint folder, or 'default'.")
    ] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", help="Number of expert hosts.")] = None,
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
    loaded, _, served = _own_server(config, model, hosts)
    with steadfast():
        report = measure(loaded, served, texts, seed, _note)
    _end(report, json_, check, show)


def _own_server(
    config: Path | None, model: str | None, hosts: int | None, dtype: str | None = None
) -> tuple[Config, Checkpoint, Model]:
    """What a measurement serves on a cluster of its own. ConfigError where the configuration names another."""
    from cluster.config import load_config
    from workloads.bench.chaos_mesh import own_cluster
    from workloads.bench.chaos_run import Model
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
    return loaded, checkpoint, Model(name, int(checkpoint.text_config["vocab_size"]))


def _note(text: str) -> None:
    Console(stderr=True).print(text, highlight=False)


def _end(
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


def _methods(text: str) -> tuple[str, ...]:
    from cluster.errors import ConfigError

    names = tuple(text.split(","))
    if strange := [name for name in names if name not in _METHODS]:
        raise ConfigError(f"--methods: there is no {strange[0] or 'empty name'}", f"of {', '.join(_METHODS)}")
    if "ours" not in names:
        raise ConfigError("--methods without ours compares nothing", "add ours")
    return names


def _numbers(flag: str, text: str, kind: type[_Number]) -> tuple[_Number, ...]:
    from cluster.errors import ConfigError

    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{flag} {text!r} is no list of numbers from 1 on", f"for example {flag} 8,16")
    return numbers
