"""`expertmesh bench swap`: a version published, staged, promoted and rolled back again and again under load.

1. a server of its own with an empty store of versions, in float32, so that tokens can be compared one by one
2. three experts are changed, published by the command, and staged; bytes, seconds and memory of each
3. each version's answers without load changes: what its answers must be, token by token
4. streams of requests go on while one version is promoted and the other comes back, and every answer is held
   against the version that it names
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.errors import HostError
from workloads.bench.chaos_load import Answer, Prompt, once, prompts, streamed
from workloads.bench.chaos_mesh import Mesh, started
from workloads.bench.chaos_run import Model
from workloads.bench.chaos_scenario import Load
from workloads.bench.chaos_statistics import Reference, gaps, in_window, outcomes, reasons, reference
from workloads.bench.ports import free_port
from workloads.bench.report import Bar, envelope, now, quantiles

# What the issue of a swap is: three experts of their own, as different from the checkpoint's as these are from another.
_CHANGED: Final = 3
_NOISE: Final = 0.5
_STAGE_S: Final = 120.0
# Between two swaps: as long as a swap and what follows it, to compare with.
_APART_S: Final = 0.5
# All streams begin at once: their prompts are one long step, which no other moment has.
_BEGUN_S: Final = 8.0
_AFTER_NS: Final = 300_000_000


@dataclass(frozen=True, slots=True)
class Swap:
    """One promotion; nanoseconds of CLOCK_MONOTONIC."""

    to: str
    begin_ns: int
    end_ns: int
    everywhere: bool


def measure(
    config: Config, checkpoint: Checkpoint, model: Model, cycles: int, seed: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """The report. Raises an ExpertmeshError if the server can't start, or the version can't be had."""
    started_at = now()
    with tempfile.TemporaryDirectory(prefix="expertmesh-swap-") as folder:
        store = Path(folder) / "versions"
        config = config.model_copy(
            update={
                "server": config.server.model_copy(update={"host": "127.0.0.1", "port": free_port()}),
                "versions": config.versions.model_copy(
                    update={"store": str(store), "options": {}, "keep_warm": 3600.0, "running": "finish"}
                ),
            }
        )
        changed = changed_experts(checkpoint, Path(folder) / "changed.safetensors", seed)
        note("starting a server")
        with started(config, model.name, model.vocabulary) as mesh:
            before = _bytes(store)
            published = publish(checkpoint, store, Path(folder) / "changed.safetensors")
            candidate, stored = str(published["digest"]), _bytes(store) - before
            load = Load(streams=16, seed=seed, prompts=2)
            streams = prompts(load, mesh.vocabulary)
            base = mesh.call("versions").serving
            note("what the checkpoint as it is answers")
            expected = {base: _answers(mesh, load, streams)}
            memory_before = _memory(mesh)
            stage_s = stage(mesh, candidate)
            memory_ratio = _memory(mesh) / (memory_before + changed * _copies(mesh))
            note("what the version answers")
            mesh.call("promote", candidate, "bench", "", None)
            expected[candidate] = _answers(mesh, load, streams)
            mesh.call("promote", base, "bench", "", None)
            note(f"{cycles} promotions and as many rollbacks under {load.streams} streams")
            swaps, answers = _swapped(mesh, load, streams, (candidate, base), cycles)
            engine = mesh.stats() or {}
            mesh.end()
    found = judged(swaps, answers, expected, candidate)
    found |= {
        "stored_bytes_ratio": stored / changed,
        "publish_s": published["seconds"],
        "stage_s": stage_s,
        "memory_ratio": memory_ratio,
        "slowest_table_ms": float(engine.get("slowest_table_seconds", 0.0)) * 1e3,
    }
    bars = [
        Bar("failed_requests", found["failed_requests"], 0, True),
        Bar("mixed_responses", found["mixed_responses"], 0, True),
        Bar("pause_p99_ms", found["pause_p99_ms"], 50, True),
        Bar("promote_p99_ms", found["promote_p99_ms"], 200, True),
        Bar("rollback_p99_ms", found["rollback_p99_ms"], 200, True),
        Bar("stored_bytes_ratio", found["stored_bytes_ratio"], 1.01, True),
        Bar("publish_s", found["publish_s"], 2, True),
        Bar("memory_ratio", found["memory_ratio"], 1.05, True),
    ]
    series = found.pop("series")
    return envelope(
        "bench swap", seed=seed, started_at=started_at, series=series, bars=bars, model=model.name, **found
    )


def changed_experts(
    checkpoint: Checkpoint, file: Path, seed: int, *, experts: int = _CHANGED, noise: float = _NOISE
) -> int:
    """Write some experts of as many layers to a file, as one would publish them; their bytes.

    `noise`: of each tensor's standard deviation.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    layers = [layer.index for layer in checkpoint.moe_layers]
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]][:experts]
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, layer in enumerate(chosen):
        layout = checkpoint.layout(layer)
        expert = (2 * number + 1) % layout.num_experts
        for part in layout.parts:
            name = layout.tensor_name(part, expert)
            with safe_open(checkpoint.path / checkpoint.tensors[name].file, framework="pt") as opened:
                tensor = opened.get_slice(name)[expert] if layout.fused else opened.get_tensor(name)
            added = torch.randn(tensor.shape, generator=dice) * tensor.float().std() * noise
            given = name.replace("experts.", f"experts.{expert}.", 1) if layout.fused else name
            tensors[given] = (tensor.float() + added).to(tensor.dtype)
    save_file(tensors, file)
    return sum(tensor.nbytes for tensor in tensors.values())


def judged(
    swaps: Sequence[Swap], answers: Sequence[Answer], expected: Mapping[str, Reference], candidate: str
) -> dict[str, Any]:
    """What the swaps did to the answers; times in milliseconds. A pause is how much longer the longest gap of any
    stream around a swap is than around a moment without one, as quantiles of all of them.
    """
    found = gaps(answers)
    windows = [(swap.begin_ns, swap.end_ns + _AFTER_NS) for swap in swaps]
    longest = [_longest(found, *window) for window in windows]
    between = [
        _longest(
            found,
            (a.end_ns + _AFTER_NS + b.begin_ns) // 2,
            (a.end_ns + _AFTER_NS + b.begin_ns) // 2 + w[1] - w[0],
        )
        for a, b, w in zip(swaps, swaps[1:], windows, strict=False)
    ]
    took = {
        forth: [(swap.end_ns - swap.begin_ns) / 1e6 for swap in swaps if (swap.to == candidate) == forth]
        for forth in (True, False)
    }
    ok = [answer for answer in answers if answer.outcome == "ok"]
    mixed = [answer for answer in ok if not _whole(answer, expected)]
    one, other = expected.values()
    return {
        "cycles": len(swaps) // 2,
        "requests": len(answers),
        "failed_requests": len(answers) - len(ok),
        "outcomes": outcomes(answers),
        "reasons": reasons(answers),
        "mixed_responses": len(mixed),
        "responses_by_version": {name: sum(answer.manifest == name for answer in ok) for name in expected},
        "prompts_that_tell_versions_apart": sum(
            not one.answers[key] & other.answers[key] for key in one.answers
        ),
        "prompts": len(one.answers),
        "pause_p99_ms": max(0.0, quantiles(longest).p99 - quantiles(between).p99),
        "pause_p50_ms": max(0.0, quantiles(longest).p50 - quantiles(between).p50),
        "promote_p99_ms": quantiles(took[True]).p99,
        "rollback_p99_ms": quantiles(took[False]).p99,
        "not_everywhere": sum(not swap.everywhere for swap in swaps),
        "series": {
            "longest_gap_around_swap_ms": longest,
            "longest_gap_between_swaps_ms": between,
            "promote_ms": took[True],
            "rollback_ms": took[False],
        },
    }


def _whole(answer: Answer, expected: Mapping[str, Reference]) -> bool:
    """Whether an answer is what the version that it names answers without any swap."""
    named = expected.get(answer.manifest)
    return named is not None and answer.tokens in named.answers[answer.key]


def _longest(found: Sequence[Any], from_ns: int, to_ns: int) -> float:
    return max((gap.ms for gap in in_window(found, from_ns, to_ns)), default=0.0)


def _answers(mesh: Mesh, load: Load, streams: tuple[tuple[Prompt, ...], ...]) -> Reference:
    return reference(asyncio.run(once(mesh.url, mesh.name, load, streams, passes=2)))


def _swapped(
    mesh: Mesh, load: Load, streams: tuple[tuple[Prompt, ...], ...], versions: tuple[str, str], cycles: int
) -> tuple[list[Swap], list[Answer]]:
    """Both versions in turn while the load goes on."""
    swaps: list[Swap] = []
    over = threading.Event()

    def swap() -> None:
        try:
            time.sleep(_BEGUN_S)
            for number in range(2 * cycles):
                to = versions[number % 2]
                begin_ns = time.monotonic_ns()
                if number % 2:
                    done = mesh.call("rollback", "bench", "")
                    if done.manifest != to:
                        raise HostError(f"rolled back to {done.manifest[:12]} in place of {to[:12]}")
                else:
                    done = mesh.call("promote", to, "bench", "", None)
                swaps.append(Swap(to, begin_ns, time.monotonic_ns(), done.everywhere))
                time.sleep(2 * _APART_S)
        finally:
            over.set()

    async def run() -> list[Answer]:
        swapping = asyncio.get_running_loop().run_in_executor(None, swap)
        answers = await streamed(mesh.url, mesh.name, load, streams, lambda sent, seconds: not over.is_set())
        await swapping
        return answers

    return swaps, asyncio.run(run())


def stage(mesh: Mesh, candidate: str) -> float:
    """Have a version loaded; the seconds that it took."""
    began = time.monotonic()
    mesh.call("stage", candidate)
    while candidate not in mesh.call("versions").live:
        if time.monotonic() - began > _STAGE_S:
            raise HostError(f"version {candidate[:12]} was not loaded within {_STAGE_S:g} s")
        time.sleep(0.02)
    return time.monotonic() - began


def publish(checkpoint: Checkpoint, store: Path, file: Path) -> dict[str, Any]:
    """By the command, as an operator would; with the seconds that it took, the start of Python included."""
    command = [
        sys.executable,
        "-c",
        "from workloads.cli import main; main()",
        "versions",
        "publish",
        str(file),
    ]
    command += ["--model", str(checkpoint.path), "--store", str(store), "--json", "--reason", "bench swap"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    seconds = time.monotonic() - began
    if done.returncode:
        raise HostError(f"the version could not be published: {done.stderr.strip()}")
    return {**json.loads(done.stdout), "seconds": seconds}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _memory(mesh: Mesh) -> int:
    """Resident bytes of all hosts."""
    reports = mesh.call("reports")
    return sum(report.rss_bytes for report in reports.values())


def _copies(mesh: Mesh) -> int:
    """How many hosts have each changed expert; the bench is for meshes where that is the same for all."""
    reports = mesh.call("reports")
    layers = mesh.call("deployment").layers
    return round(
        sum(report.experts_loaded for report in reports.values()) / sum(layer.num_experts for layer in layers)
    )


def show(report: dict[str, Any], out: Console) -> None:
    """The figures and bars for a terminal."""
    for key in ("cycles", "requests", "responses_by_version", "stage_s", "pause_p50_ms", "slowest_table_ms"):
        out.print(f"{key}: {report[key]}", highlight=False)
    for key, bar in report["bars"].items():
        out.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
