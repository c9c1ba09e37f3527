"""What a host's experts cost: measured at its start with its own kernel, and kept for the next start.

A layer is run over a few sizes, from one row on one expert to many rows on all of them, which separates what reading
an expert costs from what a row costs. Of several runs the shortest counts: others may be using the cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import structlog
import torch

from actors.cuda_layer import CudaLayer
from actors.expert_kernels import LayerExperts
from actors.native_library import processor
from cluster.cache_folder import cache_folder
from cluster.cost_fit import Timing, fit
from cluster.messages import HostCost, HostSpec

log = structlog.get_logger()

# Of what is kept; another one where the way to measure changes.
_FORMAT: Final = 1
_ROWS: Final = (1, 2, 4, 8, 16, 64, 256)
_RUNS: Final = 4
_GPU_ROWS: Final = (1, 8, 64, 256, 1024)
# Of each size: longer than the turns that processes on one GPU take.
_GPU_S: Final = 0.03
_BUDGET_S: Final = 2.0


def measured_cost(
    spec: HostSpec, layer: LayerExperts, experts: int, hidden: int, top_k: int
) -> HostCost | None:
    """The cost of a host of this kind; None of a kernel that computes nothing."""
    if layer.kernel == "noop":
        return None
    if isinstance(layer, CudaLayer):
        # Quick, and not to be kept: next time others may be using the GPU.
        return fit(list(device_timings(layer, experts, hidden, top_k, getattr(torch, spec.dtype))))
    kept = cache_folder() / "costs" / f"{_identity(spec, layer, experts)}.json"
    try:
        return HostCost(**json.loads(kept.read_text()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        log.warning("a measured cost can't be read", file=str(kept), reason=str(error))
    cost = fit(list(timings(layer, experts, hidden, top_k, getattr(torch, spec.dtype))))
    _keep(kept, cost)
    return cost


def timings(
    layer: LayerExperts,
    experts: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Timing]:
    """How long batches of several sizes take, the small ones first, for about two seconds at most."""
    end = clock() + _BUDGET_S
    for touched, x, slots, weights in _batches(_ROWS, experts, hidden, top_k, dtype):
        out = torch.empty_like(x)
        layer.compute(x, slots, weights, out)
        taken = []
        for _ in range(_RUNS):
            began = clock()
            layer.compute(x, slots, weights, out)
            taken.append(clock() - began)
        yield Timing(slots.numel(), touched, max(min(taken), 1e-7))
        if clock() > end:
            return


def device_timings(
    layer: CudaLayer, experts: int, hidden: int, top_k: int, dtype: torch.dtype
) -> Iterator[Timing]:
    """How long a GPU takes for batches of several sizes."""
    for touched, x, slots, weights in _batches(_GPU_ROWS, experts, hidden, top_k, dtype):
        yield Timing(slots.numel(), touched, layer.device_seconds(x, slots, weights, _GPU_S))


def _batches(
    sizes: Sequence[int], experts: int, hidden: int, top_k: int, dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Experts that are touched, rows, slots and weights."""
    width = min(top_k, experts)
    generator = torch.Generator().manual_seed(0)
    for rows in sizes:
        for touched in sorted({width, min(experts, width * rows), experts}):
            if touched > rows * width:
                continue
            # Each row asks for `width` experts that follow each other, so that exactly `touched` are asked for.
            slots = (torch.arange(rows * width) % touched).reshape(rows, width).to(torch.int32)
            x = torch.randn(rows, hidden, generator=generator).to(dtype)
            yield touched, x, slots, torch.full((rows, width), 1 / width)


def _identity(spec: HostSpec, layer: LayerExperts, experts: int) -> str:
    """What the cost depends on: the processor or GPU, the threads, the kernel, the model and its dtype."""
    device = processor() if spec.device == "cpu" else torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0))
    parts = (device, cores, spec.threads, layer.kernel, spec.model, spec.dtype, experts > 1, _FORMAT)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _keep(file: Path, cost: HostCost) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(asdict(cost), stream)
        Path(fresh).replace(file)
    except OSError as error:
        log.warning("a measured cost can't be kept", reason=str(error))
