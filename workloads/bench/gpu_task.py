"""Engines of `bench gpu` in processes of their own, and what they are given to do (`gpu_serving.Task`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.errors import HostError
from workloads.bench.gpu_model import ModelShape

BATCHES: Final = (1, 16, 64, 256)
_ENGINE_S: Final = 420.0


def everything(shape: ModelShape) -> dict[int, list[int]]:
    """All experts of all layers."""
    return {layer: list(range(shape.experts)) for layer in range(shape.layers)}


def host(name: str, device: str, experts: Mapping[int, Sequence[int]], threads: int = 1) -> dict[str, Any]:
    """A `gpu_mesh.HostPlan`."""
    return {"host_id": name, "device": device, "experts": experts, "threads": threads}


def spare_threads() -> int:
    """For experts on the processors: the engine takes two, one of which waits for the GPU."""
    return max(1, len(os.sched_getaffinity(0)) - 3)


def run_task(note: Callable[[str], None], name: str, **task: Any) -> dict[str, Any]:
    """Run an engine; HostError with the end of its log if it fails."""
    note(f"  {name}")
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as place:
        file = Path(place) / "task.json"
        file.write_text(json.dumps(task))
        command = [sys.executable, "-m", "workloads.bench.gpu_serving", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ENGINE_S)
        except subprocess.TimeoutExpired as error:
            raise HostError(f"{name} did not end in {_ENGINE_S:.0f} s") from error
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise HostError(f"{name} failed: {(done.stdout + done.stderr)[-2000:]}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result
