"""Two GPU hosts that both hold every expert: the plan that follows their measured speeds, beside an even split."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Final

import numpy as np

from cluster.fleet import FleetHost, PlanSettings, layer_load
from cluster.messages import HostCost
from cluster.planner import plan
from workloads.bench.gpu_engine import answers, prompts, tokens_per_second
from workloads.bench.gpu_mesh import NODE, GpuMesh

_SETTLE_S: Final = 60.0
_BUSY_S: Final = 0.001

First = Mapping[int, Sequence[str]]
"""Layer → per expert the host to ask first."""


def even(layers: Mapping[int, int], hosts: Sequence[str]) -> First:
    """Every other expert to every host; `layers`: how many experts each has."""
    return {layer: [hosts[expert % len(hosts)] for expert in range(count)] for layer, count in layers.items()}


def planned(
    costs: Mapping[str, HostCost], counts: Mapping[int, Sequence[int]], rows: int, top_k: int
) -> tuple[First, float]:
    """What the planner makes of hosts with these costs and steps of so many rows, and the seconds that it predicts."""
    loads = [
        layer_load(layer, 1, np.array([chosen], dtype=np.float64), rows * top_k)
        for layer, chosen in sorted(counts.items())
    ]
    most = sum(len(chosen) for chosen in counts.values())
    hosts = [FleetHost(name, most, cost, device="cuda", node=NODE) for name, cost in costs.items()]
    made = plan(hosts, loads, None, PlanSettings(redundancy=1.0))
    first = {layer.layer: [made.hosts[holders[0]] for holders in layer.holders] for layer in made.layers}
    return first, made.seconds


def compare(llm: Any, mesh: GpuMesh, batch: int, vocabulary: int, runs: int) -> dict[str, Any]:
    """Tokens per second with either, in turns."""
    answers(llm, prompts(batch, vocabulary), 16)
    traffic = json.loads(llm.collective_rpc("expertmesh_traffic")[0])
    counts = {int(layer): chosen for layer, chosen in traffic["chosen"].items()}
    costs = {name: report.cost or HostCost() for name, report in mesh.reports.items()}
    first, seconds = planned(costs, counts, batch, mesh.checkpoint.top_k)
    splits = {
        "even": even({layer: len(chosen) for layer, chosen in counts.items()}, list(costs)),
        "planned": first,
    }
    taken: dict[str, list[float]] = {name: [] for name in splits}
    for _ in range(runs):
        for name, split in splits.items():
            _use(llm, mesh.table(split))
            taken[name] += tokens_per_second(llm, batch, vocabulary, 1)
    total = sum(map(len, first.values()))
    return {
        "batch": batch,
        "predicted_s": seconds,
        "share": {
            name: sum(hosts.count(name) for hosts in map(list, first.values())) / total for name in costs
        },
        "tokens_per_s": {name: round(median(runs), 1) for name, runs in taken.items()},
        "runs": taken,
    }


def _use(llm: Any, table: str) -> None:
    left, until = llm.collective_rpc("expertmesh_set_table", args=(table,))[0], time.monotonic() + _SETTLE_S
    while left and time.monotonic() < until:
        left = llm.collective_rpc("expertmesh_settle", args=(1.0,))[0]


@contextlib.contextmanager
def half_occupied(device: int) -> Iterator[None]:
    """Another process computes on the GPU half of the time, until the block ends."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_occupy, args=(device, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise AssertionError("the process that occupies a GPU did not begin")
        yield
    finally:
        process.kill()
        process.join()


def _occupy(device: int, ready: Any) -> None:
    import torch

    torch.cuda.set_device(device)
    a = torch.randn(4096, 4096, device="cuda").bfloat16()
    while True:
        began = time.perf_counter()
        while time.perf_counter() - began < _BUSY_S:
            a @ a
            torch.cuda.synchronize()
        ready.set()
        time.sleep(time.perf_counter() - began)
