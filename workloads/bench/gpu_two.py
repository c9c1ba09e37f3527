"""`bench gpu --gpus 2`: experts on another GPU than the engine's, beside vLLM's own tensor and expert parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final

from workloads.bench.gpu_model import ModelShape, make
from workloads.bench.gpu_placement import half_occupied
from workloads.bench.gpu_task import BATCHES, everything, host, run_task
from workloads.bench.report import Bar

PARTS: Final = ("roundtrip", "tokens", "serving", "kill", "placement")
# Both engines of a machine's two GPUs hold half of the weights each, the mesh's none of the experts'.
_ENGINE: Final = {"kv_cache_memory_bytes": 3 << 30, "gpu_memory_utilization": 0.4}
_FEWER: Final = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 32}
_STOCK: Final = {**_ENGINE, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
_SMALL: Final = ModelShape(4, 512, 256, 32, 4, 8, 2, 64, 4096)
_FLOOR_TIMES, _RATIO, _GAP_MS = 2.0, 0.8, 500.0
_HELD_TO_RATIO: Final = (64, 256)


def measure(part: str, folder: Path, note: Callable[[str], None]) -> Any:
    """One of PARTS, on GPUs 0 and 1."""
    if part == "roundtrip":
        from workloads.bench import gpu_apart

        return [asdict(turns) for turns in gpu_apart.measure()]
    return {"tokens": _tokens, "serving": _serving, "kill": _kill, "placement": _placement}[part](
        folder, note
    )


def bars(found: dict[str, Any]) -> list[Bar]:
    """What the parts that ran are held against."""
    made = [
        Bar(
            f"neighbour_{turns['rows']}x{turns['hidden']}_over_best",
            turns["p50_us"] / turns["floor_us"],
            _FLOOR_TIMES,
            True,
        )
        for turns in found["roundtrip"]
        if turns["path"] == "neighbour"
    ]
    made += [
        Bar(f"{row['setup']}, {row['batch']}", row["ratio"], _RATIO, False)
        for row in found["serving"]
        if row["batch"] in _HELD_TO_RATIO
    ]
    for killed in found["kill"]:
        made += [
            Bar("kill_failed", killed["failed"], 0, True),
            Bar("kill_gap_ms", killed["longest_gap_ms"], _GAP_MS, True),
            Bar("experts_after_return", killed["experts_after_return"], 1, False),
        ]
    made += [
        Bar(
            f"planned_over_even_{row['batch']}",
            row["tokens_per_s"]["planned"] / row["tokens_per_s"]["even"],
            1.0,
            False,
        )
        for row in found["placement"]
    ]
    if found["tokens"]:
        made.append(
            Bar("unequal_tokens", sum(not same for same in found["tokens"]["equal"].values()), 0, True)
        )
    return made


def _tokens(folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Greedy tokens in float32 of stock vLLM, and of one layer's experts on both GPUs and the processors."""
    model = make(folder / "small", _SMALL, "float32")
    parts = [{layer: held[third::3] for layer, held in everything(_SMALL).items()} for third in range(3)]
    hosts = [
        host(name, device, held, 4)
        for name, device, held in zip("abc", ("cuda:0", "cuda:1", "cpu"), parts, strict=True)
    ]
    common = {"model": str(model), "dtype": "float32", "compare": 8, "engine": _FEWER}
    stock = run_task(note, "stock vLLM", hosts=None, **common)["tokens"]
    told = run_task(note, "both GPUs and the processors", hosts=hosts, **common)["tokens"]
    return {"answers": len(stock), "equal": {"both GPUs and the processors": told == stock}}


def _serving(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    shape = ModelShape()
    common = {"model": str(make(folder / "uniform", shape)), "batches": BATCHES}
    every = everything(shape)
    even, odd = ({layer: held[first::2] for layer, held in every.items()} for first in (0, 1))
    stock = {
        "tp2": run_task(note, "vLLM, tensor parallel", hosts=None, engine=_STOCK, **common),
        "ep2": run_task(
            note,
            "vLLM, expert parallel",
            hosts=None,
            engine={**_STOCK, "enable_expert_parallel": True},
            **common,
        ),
    }
    setups = {
        "experts on GPU 1": [host("b", "cuda:1", every)],
        "experts on both": [host("a", "cuda:0", even), host("b", "cuda:1", odd)],
    }
    rows = []
    for setup, hosts in setups.items():
        ours = run_task(note, setup, hosts=hosts, engine=_ENGINE, **common)
        for batch in BATCHES:
            tokens = median(ours["tokens_per_s"][str(batch)])
            theirs = {
                name: round(median(result["tokens_per_s"][str(batch)]), 1) for name, result in stock.items()
            }
            best = max(theirs.values())
            rows.append(
                {
                    "batch": batch,
                    "tokens_per_s": round(tokens, 1),
                    "vllm_tokens_per_s": best,
                    "ratio": round(tokens / best, 4),
                    "setup": setup,
                    "asked": ours["stats"]["asked"],
                    **theirs,
                }
            )
    return rows


def _kill(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The host on GPU 1, all of whose experts GPU 0 has too; it comes back."""
    shape = ModelShape()
    every = everything(shape)
    done = run_task(
        note,
        "a host on GPU 1 is killed",
        model=str(make(folder / "uniform", shape)),
        hosts=[host("b", "cuda:1", every), host("a", "cuda:0", every)],
        kill="b",
        again=True,
        engine=_ENGINE,
    )
    return [done["kill"]]


def _placement(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every expert on both GPUs, another process on GPU 1 half of the time."""
    shape = ModelShape()
    every = everything(shape)
    model = make(folder / "uniform", shape)
    with half_occupied(1):
        done = run_task(
            note,
            "a plan over a whole and a half-occupied GPU",
            model=str(model),
            hosts=[host("a", "cuda:0", every), host("b", "cuda:1", every)],
            place=64,
            engine=_ENGINE,
        )
    costs = {name: report["cost"] for name, report in done["hosts"].items()}
    return [{**done["placement"], "costs": costs}]
