"""`expertmesh bench dispatch | hot-path | prediction | swap | canary | serve | replicas`."""

from __future__ import annotations

import os
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

bench_app = typer.Typer(help="Measurements; each can write one JSON object.", no_args_is_help=True)


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

    err = Console(stderr=True)
    # Plain lines: a spinner's thread would wake up in the middle of what is measured.
    report = measure(
        Settings(rounds, ray, seed), lambda size: err.print(f"measuring {size}", highlight=False)
    )
    end(report, json_, check, show)


@bench_app.command(name="hot-path")
def hot_path(json_: JsonFile = None, seed: Seed = 0, check: Check = False) -> None:
    """What counting choices and splitting rows over replicas adds to every layer of every step."""
    from workloads.bench.hot_path import measure, show

    report = measure(seed)
    end(report, json_, check, show)


@bench_app.command()
def prediction(
    json_: JsonFile = None,
    config: ConfigFile = None,
    model: Model = None,
    hosts: Hosts = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """How far the planner's predictions are from what dispatches take, on a running mesh."""
    from workloads.bench.chaos_server import steadfast
    from workloads.bench.prediction import measure, show

    loaded, _, served = own_server(config, model, hosts)
    with steadfast():
        report = measure(loaded, served, seed, note)
    end(report, json_, check, show)


@bench_app.command()
def swap(
    json_: JsonFile = None,
    config: ConfigFile = None,
    model: Model = None,
    hosts: Hosts = None,
    cycles: Annotated[int, typer.Option(min=2, help="Promotions, and as many rollbacks.")] = 100,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """A version published, staged, and promoted and rolled back again and again under load."""
    from workloads.bench.chaos_server import steadfast
    from workloads.bench.swap import measure, show

    # Tokens are compared one by one.
    loaded, checkpoint, served = own_server(config, model, hosts, dtype="float32")
    with steadfast():
        report = measure(loaded, checkpoint, served, cycles, seed, note)
    end(report, json_, check, show)


@bench_app.command()
def canary(
    json_: JsonFile = None,
    config: ConfigFile = None,
    model: Model = None,
    hosts: Hosts = None,
    runs: Annotated[int, typer.Option(min=1, help="Trials of the version that is as good.")] = 20,
    seconds: Annotated[float, typer.Option(min=1, help="How long each of them lasts at most.")] = 30.0,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """A bad version on trial, and one that is as good, again and again: what the trial makes of them."""
    from workloads.bench.canary import measure, show
    from workloads.bench.chaos_server import steadfast

    loaded, checkpoint, served = own_server(config, model, hosts, dtype="float32")
    with steadfast():
        report = measure(loaded, checkpoint, served, runs, seconds, seed, note)
    end(report, json_, check, show)


@bench_app.command()
def serve(
    json_: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both servers at each concurrency.")] = 6,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 48,
    config: ConfigFile = None,
    model: Model = None,
    hosts: Hosts = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the mesh's server.")] = None,
    seed: Seed = 0,
    check: Check = False,
) -> None:
    """Throughput and latency of the mesh beside stock vLLM, in turn in one run."""
    from cluster.config import load_config
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
    end(report, json_, check, show)


@bench_app.command()
def replicas(
    json_: JsonFile = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both servers at each concurrency.")] = 10,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens per answer.")] = 48,
    config: ConfigFile = None,
    model: Model = None,
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
    end(report, json_, check, show)
