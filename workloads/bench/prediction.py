"""Predicted against measured time of a step's experts, on a running mesh: how good the planner's costs are.

1. a server of its own, whose hosts measured themselves at their start
2. the same load as a chaos run's, without a fault: one stream at a time, then all of them
3. the controller's own account: each sampled step was predicted before the costs were corrected by it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from cluster.config import Config
from cluster.errors import HostError
from cluster.experts_report import ExpertsReport
from workloads.bench.chaos_load import once, prompts
from workloads.bench.chaos_mesh import started
from workloads.bench.chaos_run import Model
from workloads.bench.chaos_scenario import Load
from workloads.bench.ports import free_port
from workloads.bench.report import Bar, envelope, now

_MOST_ERROR: Final = 0.15
_STREAMS: Final = (1, 4, 16)
# Engines tell of their traffic every five seconds, and of at most so many samples.
_TOLD_S: Final = 12.0


def measure(config: Config, model: Model, seed: int, note: Callable[[str], None]) -> dict[str, Any]:
    """The error at each number of streams. Raises an ExpertmeshError if the server can't start."""
    started_at = now()
    server = config.server.model_copy(update={"host": "127.0.0.1", "port": free_port()})
    results: list[dict[str, Any]] = []
    note("starting a server")
    with started(config.model_copy(update={"server": server}), model.name, model.vocabulary) as mesh:
        for streams in _STREAMS:
            note(f"{streams} streams")
            load = Load(streams=streams, seed=seed, prompts=4 if streams > 1 else 12)
            # The first pass corrects what the measurement at the start could not know. The controller's account is of
            # all steps since its start, the first pass and fewer streams included.
            for _ in range(2):
                asyncio.run(once(mesh.url, mesh.name, load, prompts(load, mesh.vocabulary)))
                time.sleep(_TOLD_S)
            report = mesh.experts()
            if report is None or report.prediction_error is None:
                raise HostError("the controller has no sample of a dispatch", "see `expertmesh status`")
            results.append(_result(streams, report))
        mesh.end()
    bars = [
        Bar(f"median_error_{result['streams']}_streams", result["median_error"], _MOST_ERROR, True)
        for result in results
    ]
    return envelope(
        "bench prediction", seed=seed, started_at=started_at, series={}, bars=bars, results=results
    )


def _result(streams: int, report: ExpertsReport) -> dict[str, Any]:
    return {
        "streams": streams,
        "median_error": report.prediction_error,
        "steps": report.predictions,
        "median_error_of_layers": report.layer_error,
        "costs": {host_id: asdict(cost) for host_id, cost in report.costs.items()},
    }


def show(report: dict[str, Any], out: Console) -> None:
    """The errors and bars for a terminal."""
    table = Table("streams", "median error", "of single layers", "steps")
    for result in report["results"]:
        table.add_row(
            str(result["streams"]),
            f"{result['median_error']:.1%}",
            f"{result['median_error_of_layers']:.1%}",
            str(result["steps"]),
        )
    out.print(table)
    for key, bar in report["bars"].items():
        out.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
