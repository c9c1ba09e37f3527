"""One engine of `bench gpu` in a process of its own: vLLM holds one model a process, and a GPU's memory until it ends.

Usage: python -m workloads.bench.gpu_serving JSON-OF-A-TASK; prints one line "RESULT " and JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from workloads.bench.gpu_engine import ANSWER, answers, engine, prompts, tokens_per_second
from workloads.bench.gpu_mesh import GpuMesh, HostPlan, gpu_mesh
from workloads.bench.gpu_placement import compare

# How long experts are taken over between two steps.
_SETTLE_S = 0.02
# And how long a host that was started again may take to be ready for rows.
_BACK_S = 60.0
_TOLD = ("dispatches", "rows", "seconds", "slowest_seconds", "lost", "late", "failovers", "mapped")


@dataclass(frozen=True)
class Task:
    """What an engine is to do."""

    model: str
    dtype: str = "bfloat16"
    hosts: list[dict[str, Any]] | None = None
    """HostPlans; None for stock vLLM."""
    batches: list[int] = field(default_factory=list)
    """Whose tokens per second are measured."""
    compare: int = 0
    """How many prompts are answered, and the tokens told."""
    kill: str = ""
    """Host that is killed in the middle of an answer of `kill_batch` requests."""
    kill_batch: int = 64
    again: bool = False
    """Whether the killed host is started again, and whether it is used then."""
    place: int = 0
    """Requests with which a plan by the hosts' costs is compared with an even split."""
    runs: int = 3
    tokens: int = ANSWER
    """Of each answer that is timed."""
    engine: dict[str, Any] = field(default_factory=dict)


def run(task: Task) -> dict[str, Any]:
    """Do it, and say what came of it."""
    model = Path(task.model)
    plans = None if task.hosts is None else [_plan(raw) for raw in task.hosts]
    with contextlib.nullcontext() if plans is None else gpu_mesh(model, task.dtype, plans) as mesh:
        began = time.perf_counter()
        llm = engine(model, task.dtype, mesh, **task.engine)
        result: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1)}
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        if task.compare:
            result["tokens"] = answers(llm, prompts(task.compare, vocabulary, 24), 32)[0]
        result["tokens_per_s"] = {
            str(batch): tokens_per_second(llm, batch, vocabulary, task.runs, task.tokens)
            for batch in task.batches
        }
        if mesh is not None:
            result["hosts"] = {name: asdict(report) for name, report in mesh.reports.items()}
            if task.kill:
                result["kill"] = kill(llm, mesh, task, vocabulary)
            if task.place:
                result["placement"] = compare(llm, mesh, task.place, vocabulary, task.runs)
            result["chosen"] = chosen(llm, mesh)
            stats = llm.collective_rpc("expertmesh_stats")[0]
            result["stats"] = {
                key: stats[key] for key in ("dispatches", "rows", "lost", "failovers", "mapped", "asked")
            }
    return result


def chosen(llm: Any, mesh: GpuMesh) -> dict[str, float]:
    """Per host the share of the router's choices that it holds."""
    traffic = json.loads(llm.collective_rpc("expertmesh_traffic")[0])
    counts = {int(layer): of_layer for layer, of_layer in traffic["chosen"].items()}
    total = sum(map(sum, counts.values())) or 1
    return {
        plan.host_id: sum(counts[layer][expert] for layer, held in plan.experts.items() for expert in held)
        / total
        for plan in mesh.plans
    }


def kill(llm: Any, mesh: GpuMesh, task: Task, vocabulary: int) -> dict[str, Any]:
    """Kill a host in the middle of an answer: what became of the requests, and how long no token came.

    As the controller does, the killer notices (50 ms are allowed for that), and tells the engine while steps go on.
    """
    import torch

    inputs = prompts(task.kill_batch, vocabulary, seed=11)
    device = next(plan.device for plan in mesh.plans if plan.host_id == task.kill)
    number = torch.device(device).index or 0
    answers(llm, inputs, 16)
    undisturbed, _ = answers(llm, inputs)
    ends: list[float] = []
    struck = published = free = 0.0
    left = 1

    def step(now: float) -> None:
        nonlocal struck, published, free, left
        ends.append(now)
        if not struck and len(ends) >= ANSWER // 3:
            torch.cuda.synchronize()
            free = torch.cuda.mem_get_info(number)[0]
            mesh.kill(task.kill)
            struck = now
        elif struck and not published and now > struck + 0.05:
            llm.collective_rpc("expertmesh_set_table", args=(mesh.table(),))
            published = now
        elif published and left:
            left = llm.collective_rpc("expertmesh_settle", args=(_SETTLE_S,))[0]

    disturbed, _ = answers(llm, inputs, each_step=step)
    while left:
        left = llm.collective_rpc("expertmesh_settle", args=(_SETTLE_S,))[0]
    torch.cuda.synchronize()
    after = torch.cuda.mem_get_info(number)[0]
    if not published:
        raise AssertionError("the answers ended before the host was dead and the engine told")
    again = _again(llm, mesh, task, inputs, undisturbed) if task.again else {}
    gaps = [(after - before, after) for before, after in pairwise(ends)]
    return {
        "requests": len(inputs),
        "failed": sum(len(said) != ANSWER for said in disturbed),
        "changed": sum(a != b for a, b in zip(undisturbed, disturbed, strict=True)),
        "usual_step_ms": round(median(gap for gap, _ in gaps) * 1e3, 2),
        "longest_gap_ms": round(max(gap for gap, end in gaps if end > struck) * 1e3, 2),
        "freed_bytes": after - free,
        "host_bytes": mesh.reports[task.kill].weight_bytes,
        **again,
    }


def _again(
    llm: Any, mesh: GpuMesh, task: Task, inputs: list[list[int]], before: list[list[int]]
) -> dict[str, Any]:
    """Start the killed host again: what it is used for, and whether tokens are as before."""
    mesh.start(next(plan for plan in mesh.plans if plan.host_id == task.kill))
    left = llm.collective_rpc("expertmesh_set_table", args=(mesh.table(),))[0]
    until = time.monotonic() + _BACK_S
    while left and time.monotonic() < until:
        left = llm.collective_rpc("expertmesh_settle", args=(_SETTLE_S,))[0]
    after, _ = answers(llm, inputs)
    stats = llm.collective_rpc("expertmesh_stats")[0]
    return {
        "changed_after_return": sum(a != b for a, b in zip(before, after, strict=True)),
        "experts_after_return": stats["asked"].get(task.kill, 0) + stats["mapped"].get(task.kill, 0),
    }


def _plan(raw: dict[str, Any]) -> HostPlan:
    experts = {int(layer): tuple(held) for layer, held in raw.pop("experts").items()}
    return HostPlan(experts=experts, **raw)


def main() -> None:
    """See the module."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    result = run(Task(**json.loads(Path(sys.argv[1]).read_text())))
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
