"""One engine of `bench gpu` in a process of its own: vLLM holds one model a process, and a GPU's memory until it ends.

Usage: python -m workloads.bench.gpu_serving JSON-OF-A-TASK; prints one line "RESULT " and JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workloads.bench.gpu_engine import answers, engine, prompts, tokens_per_second
from workloads.bench.gpu_mesh import GpuMesh, HostPlan, gpu_mesh


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
    runs: int = 3
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
            str(batch): tokens_per_second(llm, batch, vocabulary, task.runs) for batch in task.batches
        }
        if mesh is not None:
            result["hosts"] = {name: asdict(report) for name, report in mesh.reports.items()}
            if task.kill:
                result["kill"] = kill(llm, mesh, task, vocabulary)
            stats = llm.collective_rpc("expertmesh_stats")[0]
            result["stats"] = {
                key: stats[key] for key in ("dispatches", "rows", "lost", "failovers", "mapped")
            }
    return result


def kill(llm: Any, mesh: GpuMesh, task: Task, vocabulary: int) -> dict[str, Any]:
    """Kill a host in the middle of an answer: what became of the requests, and how long no token came."""
    import torch

    inputs = prompts(task.kill_batch, vocabulary, seed=11)
    undisturbed, seconds = answers(llm, inputs)
    gaps, last, struck, published, free = [], 0.0, 0.0, 0.0, 0

    def step(now: float) -> None:
        nonlocal last, struck, published, free
        gaps.append((now - last, now))
        if not struck and now > seconds / 2:
            torch.cuda.synchronize()
            free = torch.cuda.mem_get_info()[0]
            mesh.kill(task.kill)
            struck = now
        # As the controller does: it looks, and tells the engine, while steps go on.
        elif struck and not published and now > struck + 0.05:
            llm.collective_rpc("expertmesh_set_table", args=(mesh.table(),))
            published = time.perf_counter()
        last = now

    disturbed, _ = answers(llm, inputs, each_step=step)
    torch.cuda.synchronize()
    after = torch.cuda.mem_get_info()[0]
    usual = sorted(gap for gap, _ in gaps)[len(gaps) // 2]
    return {
        "requests": len(inputs),
        "failed": sum(len(said) != len(undisturbed[0]) for said in disturbed),
        "changed_tokens": sum(a != b for a, b in zip(undisturbed, disturbed, strict=True)),
        "usual_step_ms": round(usual * 1e3, 2),
        "longest_gap_ms": round(max(gap for gap, now in gaps if now > struck) * 1e3, 2),
        "freed_bytes": after - free,
        "host_bytes": mesh.reports[task.kill].weight_bytes,
    }


def _plan(raw: dict[str, Any]) -> HostPlan:
    experts = {int(layer): tuple(held) for layer, held in raw.pop("experts").items()}
    return HostPlan(experts=experts, **raw)


def main() -> None:
    """See the module."""
    result = run(Task(**json.loads(Path(sys.argv[1]).read_text())))
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
