"""Experts on a GPU beside stock vLLM: parts that each end within minutes, on a machine without a network.

`kernels` and `roundtrip` run in this process; `kernels` needs vLLM's kernels, `roundtrip` torch alone. The others start
engines, each in a process of its own (`gpu_serving.py`), with hosts as they are in a mesh but without Ray.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError, HostError
from workloads.bench import gpu_two
from workloads.bench.gpu_model import ModelShape, make
from workloads.bench.gpu_task import BATCHES, everything, host, run_task, spare_threads
from workloads.bench.report import Bar, envelope, now

PARTS: Final = ("kernels", "roundtrip", "tokens", "serving", "kill", "mixed")
_SMALL: Final = ModelShape(4, 512, 256, 32, 4, 8, 2, 64, 4096)
# The same room for everybody's keys and values; hosts need the rest of the GPU.
_CACHE: Final = {"kv_cache_memory_bytes": 4 << 30}
_BESIDE: Final = {**_CACHE, "gpu_memory_utilization": 0.4}
_FEWER: Final = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 32}
# What vLLM keeps in the processors' memory in place of half of the experts.
_OFFLOADED_GB: Final = 9.0
_FLOOR_TIMES, _RIVAL_TIMES, _GAP_MS = 2.0, 1.1, 500.0
_RATIO: Final = {1: 0.7, 16: 0.7, 64: 0.9, 256: 0.9}
_ERROR: Final = {"bf16": 1e-2, "fp8": 3e-2, "int8": 3e-2}


def measure(
    parts: Sequence[str] | None, folder: Path, trace: Path | None, note: Callable[[str], None], gpus: int = 1
) -> dict[str, Any]:
    """The parts asked for, or all. ConfigError for an unknown one, HostError on a machine without so many GPUs."""
    import torch

    there = PARTS if gpus == 1 else gpu_two.PARTS
    chosen = list(there if parts is None else parts)
    if unknown := [part for part in chosen if part not in there]:
        raise ConfigError(
            f"--part {unknown[0]} is no part of this measurement", f"there are {', '.join(there)}"
        )
    if "mixed" in chosen and trace is None:
        raise ConfigError(
            "the part mixed needs a routing trace",
            "give --trace FILE.npz, or name the other parts with --part",
        )
    if not torch.cuda.is_available():
        raise HostError("no NVIDIA GPU on this machine", "run it where `nvidia-smi` shows one")
    if (found_gpus := torch.cuda.device_count()) < gpus:
        raise HostError(
            f"--gpus {gpus}: this machine has {found_gpus}", "run it where `nvidia-smi` shows so many"
        )
    started_at = now()
    found: dict[str, Any] = {
        "kernels": [],
        "roundtrip": [],
        "tokens": {},
        "serving": [],
        "kill": [],
        "mixed": [],
        "placement": [],
    }
    with models_in(folder) as models:
        for part in chosen:
            note(f"measuring {part}")
            if gpus > 1:
                found[part] = gpu_two.measure(part, models, note)
            elif part == "kernels":
                from workloads.bench import gpu_kernels

                found[part] = [asdict(time) for time in gpu_kernels.measure(note=note)]
            elif part == "roundtrip":
                from workloads.bench import gpu_roundtrip

                found[part] = [asdict(turns) for turns in gpu_roundtrip.measure()]
            elif part == "mixed":
                assert trace is not None
                found[part] = _mixed(models, trace, note)
            else:
                found[part] = {"tokens": _tokens, "serving": _serving, "kill": _kill}[part](models, note)
            torch.cuda.empty_cache()
    return envelope(
        "bench gpu",
        seed=0,
        started_at=started_at,
        series={},
        bars=_bars(found) if gpus == 1 else gpu_two.bars(found),
        gpu=_machine(),
        gpus=gpus,
        **found,
    )


@contextmanager
def models_in(folder: Path) -> Iterator[Path]:
    """A folder of this run's own, gone afterwards. ConfigError where none can be made."""
    try:
        made = tempfile.TemporaryDirectory(prefix="expertmesh-bench-", dir=folder)
    except OSError as error:
        raise ConfigError(
            f"--folder {folder}: no folder can be made there: {error.strerror}", "name one that exists"
        ) from error
    with made as path:
        yield Path(path)


def _tokens(folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Greedy tokens in float32 of stock vLLM and of meshes."""
    model = make(folder / "small", _SMALL, "float32")
    every = everything(_SMALL)
    even = {layer: experts[::2] for layer, experts in every.items()}
    odd = {layer: experts[1::2] for layer, experts in every.items()}
    meshes = {
        "two GPU hosts": [host("a", "cuda:0", even), host("b", "cuda:0", odd)],
        "a GPU host and a CPU host": [host("a", "cuda:0", even), host("b", "cpu", odd, spare_threads())],
    }
    common = {"model": str(model), "dtype": "float32", "compare": 8, "engine": _FEWER}
    stock = run_task(note, "stock vLLM", hosts=None, **common)["tokens"]
    told = {name: run_task(note, name, hosts=hosts, **common)["tokens"] for name, hosts in meshes.items()}
    return {
        "answers": len(stock),
        "distinct": len({token for answer in stock for token in answer}),
        "equal": {name: tokens == stock for name, tokens in told.items()},
    }


def _serving(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Stock vLLM, and an engine whose experts another process lends it on the same GPU."""
    shape = ModelShape()
    common = {"model": str(make(folder / "uniform", shape)), "batches": BATCHES}
    stock = run_task(note, "stock vLLM", hosts=None, engine=_CACHE, **common)
    mesh = run_task(
        note,
        "experts in another process",
        hosts=[host("a", "cuda:0", everything(shape))],
        engine=_BESIDE,
        **common,
    )
    return _beside("one GPU, a host's process", mesh, stock)


def _kill(folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """A GPU host killed under load, its replica on the GPU or on the processors."""
    shape = ModelShape()
    model = make(folder / "uniform", shape)
    every = everything(shape)
    found = []
    for replica, device, batch in (("GPU", "cuda:0", 64), ("CPU", "cpu", 4)):
        hosts = [
            host("a", "cuda:0", every),
            host("b", device, every, spare_threads() if device == "cpu" else 1),
        ]
        done = run_task(
            note,
            f"replica on the {replica}",
            model=str(model),
            hosts=hosts,
            kill="a",
            kill_batch=batch,
            engine=_BESIDE,
        )
        found.append({"replica": replica, **done["kill"]})
    return found


def _mixed(folder: Path, trace: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The cold half of the experts in the processors' memory, beside all on the GPU and vLLM's own offload."""
    import torch

    from workloads.bench.placement_trace import read_trace, scaled

    shape = ModelShape()
    real = scaled(read_trace(trace), shape.layers, shape.experts)
    share_LE = torch.tensor(real.counts(0, real.tokens))
    share_LE = share_LE / share_LE.sum(1, keepdim=True)
    order_LE = share_LE.argsort(1)
    half = shape.experts // 2
    cold = {layer: sorted(order_LE[layer, :half].tolist()) for layer in range(shape.layers)}
    hot = {layer: sorted(order_LE[layer, half:].tolist()) for layer in range(shape.layers)}
    model = make(folder / "skewed", shape, popularity_LE=share_LE)
    common = {"model": str(model), "batches": BATCHES, "tokens": 32}
    whole = run_task(
        note, "all on the GPU", hosts=[host("a", "cuda:0", everything(shape))], engine=_BESIDE, **common
    )
    hosts = [host("hot", "cuda:0", hot), host("cold", "cpu", cold, spare_threads())]
    mixed = run_task(note, "cold half on the processors", hosts=hosts, engine=_BESIDE, runs=1, **common)
    offload = {**_CACHE, "cpu_offload_gb": _OFFLOADED_GB}
    stock = run_task(note, "vLLM's offload", hosts=None, engine=offload, runs=1, **common)
    beside = _beside("cold half on the processors, beside vLLM's offload", mixed, stock)
    return [
        {
            **row,
            "all_on_gpu_tokens_per_s": median(whole["tokens_per_s"][str(row["batch"])]),
            "chosen": mixed["chosen"],
        }
        for row in beside
    ]


def _beside(setup: str, mesh: Mapping[str, Any], stock: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for batch in BATCHES:
        ours, theirs = (median(result["tokens_per_s"][str(batch)]) for result in (mesh, stock))
        rows.append(
            {
                "batch": batch,
                "tokens_per_s": round(ours, 1),
                "vllm_tokens_per_s": round(theirs, 1),
                "ratio": round(ours / theirs, 4),
                "setup": setup,
            }
        )
    return rows


def _bars(found: Mapping[str, Any]) -> list[Bar]:
    """What the parts that ran are held against."""
    bars = []
    for dtype, limit in _ERROR.items():
        times = [time for time in found["kernels"] if time["dtype"] == dtype]
        if times:
            bars += [
                Bar(f"{dtype}_error", max(time["error_of_original"] for time in times), limit, True),
                Bar(f"{dtype}_over_vllm", max(t["ms"] / t["vllm_ms"] for t in times), _RIVAL_TIMES, True),
            ]
    bars += [
        Bar(
            f"host_process_{turns['rows']}_rows_over_floor",
            turns["p50_us"] / turns["floor_us"],
            _FLOOR_TIMES,
            True,
        )
        for turns in found["roundtrip"]
        if turns["path"] == "host-process"
    ]
    bars += [
        Bar(f"serving_{row['batch']}", row["ratio"], _RATIO[row["batch"]], False) for row in found["serving"]
    ]
    bars += [Bar(f"mixed_{row['batch']}_over_offload", row["ratio"], 2.0, False) for row in found["mixed"]]
    for killed in found["kill"]:
        name = f"kill_replica_on_{killed['replica'].lower()}"
        bars += [
            Bar(f"{name}_failed", killed["failed"], 0, True),
            Bar(f"{name}_gap_ms", killed["longest_gap_ms"], _GAP_MS, True),
            Bar(f"{name}_freed", killed["freed_bytes"] / killed["host_bytes"], 0.95, False),
        ]
    if found["tokens"]:
        bars.append(
            Bar("unequal_tokens", sum(not same for same in found["tokens"]["equal"].values()), 0, True)
        )
    return bars


def _machine() -> dict[str, Any]:
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        driver = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {"name": properties.name, "memory_bytes": properties.total_memory, "driver": driver}


def show(report: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    for part in dict.fromkeys((*PARTS, *gpu_two.PARTS)):
        rows = report[part] if isinstance(report[part], list) else []
        if rows:
            table = Table(title=part)
            for column in rows[0]:
                table.add_column(column)
            for row in rows:
                table.add_row(*(str(value) for value in row.values()))
            console.print(table)
    for key, bar in report["bars"].items():
        console.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
