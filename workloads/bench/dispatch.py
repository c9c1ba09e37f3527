"""`expertmesh bench dispatch`: what a round trip to the hosts costs, beside what else could carry it.

The machine may be busy with other things, so only ratios of one run mean anything: within a size, short
blocks of every path take turns, in another order each round, and quantiles are over all blocks.
"""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from workloads.bench import dispatch_baselines as baselines
from workloads.bench.children import child
from workloads.bench.dispatch_mesh import (
    EXPERTS,
    TOP_K,
    jobs_of_process,
    mesh_path,
    serve_hosts,
)
from workloads.bench.report import Bar, Quantiles, envelope, now, quantiles

SIZES = ((1, 512), (8, 2048), (64, 2048), (256, 2048))
HOSTS = (1, 2, 4)
_HEADINGS = {
    "floor": "floor",
    "socket": "socket",
    "zeromq": "ZeroMQ",
    "ray_actor": "Ray call",
    "ray_graph": "Ray graph",
}
# At most twice the floor on one host of the same node, at every size.
FLOOR_RATIO = 2.0
# At least twenty times faster than a Ray actor call at the sizes of decode steps.
RAY_RATIO, RAY_SIZES = 20.0, ((8, 2048), (64, 2048))

_BLOCK, _RAY_BLOCK = 50, 5
_WARM_UP = 20

Call = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    rounds: int = 40
    ray: bool = True
    seed: int = 0
    sizes: Sequence[tuple[int, int]] = SIZES
    hosts: Sequence[int] = HOSTS
    block: int = _BLOCK


def measure(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Start everything, measure every size, end everything; returns the report."""
    started_at = now()
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    order = random.Random(settings.seed)
    series: dict[str, list[float]] = {}
    results: list[dict[str, Any]] = []
    graph_reason = None if settings.ray else "skipped"
    with _mesh_and_echoes(settings) as paths_of:
        for rows, hidden in settings.sizes:
            progress(f"{rows} × {hidden}")
            with ExitStack() as stack:
                paths: dict[str, Call] = {}
                for name, path in paths_of(rows, hidden).items():
                    try:
                        paths[name] = stack.enter_context(path)
                        _warm(paths[name], 3 if name.startswith("ray") else _WARM_UP)
                    except Exception as error:
                        # Compiled graphs don't work everywhere; everything else must.
                        if name != "ray_graph":
                            raise
                        paths.pop(name, None)
                        graph_reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                times = alternate(paths, settings.rounds, settings.block, order)
            series |= {f"{name}/{rows}x{hidden}_us": values for name, values in times.items()}
            found = {name: quantiles(values) for name, values in times.items()}
            results += [result(rows, hidden, hosts, found) for hosts in settings.hosts]
    return envelope(
        "bench dispatch",
        seed=settings.seed,
        started_at=started_at,
        series=series,
        bars=bars(results),
        rounds=settings.rounds,
        experts=EXPERTS,
        top_k=TOP_K,
        dtype="float32",
        ray_graph_reason=graph_reason,
        results=results,
    )


def alternate(
    paths: Mapping[str, Call], rounds: int, block: int, order: random.Random
) -> dict[str, list[float]]:
    """Microseconds of every call: per round one block of each path, the paths in a new order each time."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    turn = list(paths)
    for _ in range(rounds):
        order.shuffle(turn)
        for name in turn:
            call, append = paths[name], times[name].append
            for _ in range(min(block, _RAY_BLOCK) if name.startswith("ray") else block):
                started = perf_counter_ns()
                call()
                append((perf_counter_ns() - started) / 1e3)
    return times


def result(rows: int, hidden: int, hosts: int, found: Mapping[str, Quantiles]) -> dict[str, Any]:
    """One line of the report from the quantiles of its size; ``None`` for what was not measured."""
    ours = found[mesh_name(hosts)]
    line: dict[str, Any] = {"rows": rows, "hidden": hidden, "hosts": hosts}
    line |= {"p50_us": round(ours.p50, 2), "p99_us": round(ours.p99, 2)}
    for name in _HEADINGS:
        other = found.get(name)
        line[f"{name}_p50_us"] = None if other is None else round(other.p50, 2)
        line[f"{name}_p99_us"] = None if other is None else round(other.p99, 2)
    line["floor_ratio"] = round(ours.p50 / found["floor"].p50, 3)
    ray = found.get("ray_actor")
    line["ray_actor_ratio"] = None if ray is None else round(ray.p50 / ours.p50, 2)
    return line


def bars(results: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What must hold on one host of the same node."""
    one = [line for line in results if line["hosts"] == 1]
    floor = [
        Bar(f"floor_ratio_{line['rows']}x{line['hidden']}", line["floor_ratio"], FLOOR_RATIO, True)
        for line in one
    ]
    ray = [
        Bar(f"ray_actor_ratio_{line['rows']}x{line['hidden']}", line["ray_actor_ratio"], RAY_RATIO, False)
        for line in one
        if (line["rows"], line["hidden"]) in RAY_SIZES
    ]
    return floor + ray


def show(report: Mapping[str, Any], console: Console) -> None:
    """The report as a table, and a line per bar."""
    table = Table(title="Round trip of one dispatch, p50 in µs")
    for heading in ("rows × hidden", "hosts", "p50", "p99", *_HEADINGS.values(), "÷ floor", "Ray ÷"):
        table.add_column(heading, justify="right")
    for line in report["results"]:
        others = [_cell(line[f"{name}_p50_us"]) for name in _HEADINGS]
        ratio, ray = f"{line['floor_ratio']:.2f}", _cell(line["ray_actor_ratio"])
        size = f"{line['rows']} × {line['hidden']}"
        table.add_row(
            size, str(line["hosts"]), _cell(line["p50_us"]), _cell(line["p99_us"]), *others, ratio, ray
        )
    console.print(table)
    if report["ray_graph_reason"]:
        console.print(f"Ray compiled graph not measured: {report['ray_graph_reason']}", highlight=False)
    for key, bar in report["bars"].items():
        console.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)


def mesh_name(hosts: int) -> str:
    """The series of a dispatch over that many hosts."""
    return f"dispatch_{hosts}"


@contextlib.contextmanager
def _mesh_and_echoes(
    settings: Settings,
) -> Iterator[Callable[[int, int], dict[str, AbstractContextManager[Call]]]]:
    """All processes of the run; the value makes the paths of one size."""
    run, key = f"expertmesh-bench-{secrets.token_hex(4)}", secrets.token_bytes(32)
    widths = sorted({hidden for _, hidden in settings.sizes})
    with ExitStack() as stack:
        for serve in (baselines.echo_headers, baselines.echo_payload, baselines.echo_zeromq):
            stack.enter_context(child(serve, f"{run}-{serve.__name__}"))
        for process in range(max(settings.hosts)):
            jobs = jobs_of_process(run, process, settings.hosts, widths)
            stack.enter_context(child(serve_hosts, jobs, key))
        if settings.ray:
            from cluster.config import RayConfig
            from cluster.ray_cluster import connected

            stack.enter_context(connected(RayConfig()))

        def paths_of(rows: int, hidden: int) -> dict[str, AbstractContextManager[Call]]:
            x, out = torch.randn(rows, hidden), torch.empty(rows, hidden)
            weights = torch.rand(rows, TOP_K)
            ids = torch.rand(rows, EXPERTS).argsort(1)[:, :TOP_K].int().contiguous()
            paths: dict[str, AbstractContextManager[Call]] = {
                mesh_name(hosts): mesh_path(run, hosts, key, x, weights, ids, out) for hosts in settings.hosts
            }
            echo = partial(_echo_name, run)
            rows_np, out_np = x.numpy(), out.numpy()
            paths["floor"] = baselines.floor_path(echo(baselines.echo_headers), rows_np, out_np)
            paths["socket"] = baselines.socket_path(echo(baselines.echo_payload), rows_np, out_np)
            paths["zeromq"] = baselines.zeromq_path(echo(baselines.echo_zeromq), rows_np, out_np)
            if settings.ray:
                from workloads.bench.dispatch_ray import actor_path, graph_path

                paths |= {"ray_actor": actor_path(rows_np), "ray_graph": graph_path(rows_np)}
            return paths

        yield paths_of


def _echo_name(run: str, serve: Callable[..., None]) -> str:
    return f"{run}-{serve.__name__}"


def _warm(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
