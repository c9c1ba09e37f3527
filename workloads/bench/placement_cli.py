"""`expertmesh bench placement | solver`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.console import Console

from workloads.bench.command_parts import Check, JsonFile, Seed, end
from workloads.bench.gpu_cli import bench_app as bench_app

_METHODS: Final = ("ours", "eplb", "round_robin", "random")
_Number = TypeVar("_Number", int, float)


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
    if plot is not None:
        draw(report, planned, plot)
    end(report, json_, check, show)


@bench_app.command()
def solver(
    seeds: Annotated[int, typer.Option(min=1, help="Random layers of each size.")] = 3,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that HiGHS has for a layer.")] = 60.0,
    json_: JsonFile = None,
    check: Check = False,
) -> None:
    """The planner's search beside HiGHS's mixed-integer solver, on layers of growing size."""
    from workloads.bench.solver import measure, show

    err = Console(stderr=True)
    report = measure(seeds, limit, lambda text: err.print(text, highlight=False, markup=False))
    end(report, json_, check, show)


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
