"""How long a GPU host's experts take, how right they are, and what the machine allows.

Times are medians of replayed CUDA graphs, with rotating rows so that no batch finds its own experts in the cache by
chance. The floor is the larger of two: the bytes of the experts that are touched over the bandwidth that a copy or
a plain reading reached, and the operations over the rate that a large product reached, both measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from actors.cuda_memory import CudaSlots
from actors.slot_format import SlotFormat, run_experts, skipping
from actors.stored_expert import ExpertMatrices

TOKENS: Final = (1, 8, 64, 256, 1024, 4096)
WEIGHTS: Final = ("plain", "fp8", "int8")
# Rows whose sums are held against float64.
_CHECKED: Final = 16
_REPLAYS: Final = 30


@dataclass(frozen=True, slots=True)
class LayerShape:
    """`local` of `experts` experts are on the GPU: routers choose among all."""

    name: str
    experts: int
    local: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES: Final = (
    LayerShape("A", 128, 128, 8, 2048, 768),
    LayerShape("B", 256, 32, 8, 7168, 2048),
)


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel at one size."""

    shape: str
    tokens: int
    dtype: str
    """bf16, or what the weights are kept in: fp8, int8."""
    ms: float
    vllm_ms: float
    """vLLM's fused experts over bf16 weights of its own layout, in the same run."""
    floor_ms: float
    grouped_mm_ms: float | None
    """The same sums by torch's grouped_mm, sorting included; bf16 only."""
    error: float
    """Of the sums against float64, ‖y - ref‖ / ‖ref‖, with the weights as they are kept."""
    error_of_original: float
    """The same with the weights before they were put into 8 bits."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    bytes_per_s: float
    operations_per_s: float


def measure(device: int = 0, note: Callable[[str], None] = lambda text: None) -> list[KernelTime]:
    """Every shape, number of tokens and kind of weights."""
    with torch.cuda.device(device):
        top = ceilings()
        return [time for shape in SHAPES for time in _shape(shape, device, top, note)]


def ceilings() -> Ceilings:
    """What this GPU reaches: 4 GiB read, or copied, whichever is faster, and a product of 8192³ in bf16."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / (median_ms(partial(target.copy_, source)) / 1e3)
    read = source.nbytes / (median_ms(source.sum) / 1e3)
    source = target = torch.empty(0)
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    rate = 2 * 8192**3 / (median_ms(lambda: torch.mm(left, right, out=out)) / 1e3)
    return Ceilings(max(copied, read), rate)


def median_ms(call: Callable[[], Any], replays: int = _REPLAYS) -> float:
    """Milliseconds of a call, as a graph that is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    taken = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return sorted(taken)[len(taken) // 2]


def _shape(
    shape: LayerShape, device: int, top: Ceilings, note: Callable[[str], None]
) -> Iterator[KernelTime]:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device="cuda") * size[-1] ** -0.5).bfloat16()

    up_EUH = random(shape.local, 2 * shape.intermediate, shape.hidden)
    down_EHI = random(shape.local, shape.hidden, shape.intermediate)
    for weights in WEIGHTS:
        form = SlotFormat(shape.hidden, shape.intermediate, "bfloat16", weights, "silu")
        slots = CudaSlots(device, shape.local + 1, form.size)
        tensors = form.tensors(slots.bytes()[: shape.local])
        for expert in range(shape.local):
            slots.take(expert)
            gate, up = up_EUH[expert].chunk(2)
            form.put(tensors, expert, ExpertMatrices(gate, up, down_EHI[expert]))
        slots.take(shape.local)
        slots.bytes()[shape.local].zero_()
        for tokens in TOKENS:
            note(f"shape {shape.name}, {weights}, {tokens} tokens")
            yield _time(shape, form, tensors, up_EUH, down_EHI, tokens, top, generator)
        torch.cuda.synchronize()
        for slot in range(shape.local + 1):
            slots.release(slot)


def _time(
    shape: LayerShape,
    form: SlotFormat,
    kept: Any,
    up_EUH: torch.Tensor,
    down_EHI: torch.Tensor,
    tokens: int,
    top: Ceilings,
    generator: torch.Generator,
) -> KernelTime:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    x = torch.randn(tokens, shape.hidden, generator=generator, device="cuda").bfloat16()
    logits = torch.randn(tokens, shape.experts, generator=generator, device="cuda")
    weights, ids = logits.softmax(-1).topk(shape.top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).contiguous()
    ids = ids.to(torch.int32)
    here = ids < shape.local
    places = torch.where(here, ids, shape.local).int().contiguous()
    mine = torch.where(here, weights, 0.0).contiguous()

    whole = shape.local == shape.experts
    skip = None if whole else skipping(shape.local, x.device)

    def ours() -> torch.Tensor:
        return run_experts(kept, "silu", x, places, mine, skip)

    expert_map = None
    if not whole:
        expert_map = torch.full((shape.experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[: shape.local] = torch.arange(shape.local, dtype=torch.int32, device="cuda")

    def stock() -> torch.Tensor:
        return fused_experts(
            x, up_EUH, down_EHI, weights, ids, global_num_experts=shape.experts, expert_map=expert_map
        )

    if not int(here.sum()):
        # Nothing to be held against: one pair at least is of an expert that is here.
        ids[0, 0], places[0, 0], mine[0, 0] = 0, 0, weights[0, 0]
        here = ids < shape.local
    touched = int(ids[here].unique().numel())
    pairs = int(here.sum())
    item = form.stored.itemsize
    per_expert = 3 * shape.hidden * shape.intermediate
    floor_s = max(
        touched * per_expert * item / top.bytes_per_s, 2 * pairs * per_expert / top.operations_per_s
    )
    y = ours().double().cpu()
    rows = range(min(tokens, _CHECKED))
    as_kept = _reference(x, ids, weights, shape.local, rows, lambda e: _widened(kept, e))
    original = _reference(
        x, ids, weights, shape.local, rows, lambda e: (up_EUH[e].double().cpu(), down_EHI[e].double().cpu())
    )
    return KernelTime(
        shape.name,
        tokens,
        "bf16" if form.weights == "plain" else form.weights,
        round(median_ms(ours), 4),
        round(median_ms(stock), 4),
        round(floor_s * 1e3, 4),
        round(median_ms(_grouped(x, places, mine, up_EUH, down_EHI)), 4) if form.weights == "plain" else None,
        _error(y[: len(rows)], as_kept),
        _error(y[: len(rows)], original),
    )


def _error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float(f"{float((y - reference).norm() / reference.norm()):.3g}")


def _widened(kept: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    up, down = (tensor[expert].to(torch.float32).double().cpu() for tensor in kept[:2])
    if kept.up_scale_SU is not None:
        up *= kept.up_scale_SU[expert].double().cpu()[:, None]
        down *= kept.down_scale_SH[expert].double().cpu()[:, None]
    return up, down


def _reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    local: int,
    rows: range,
    matrices: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The sums of the first rows in float64 on the CPU."""
    out = torch.zeros(len(rows), x.shape[1], dtype=torch.float64)
    chosen = ids[: len(rows)].cpu()
    for expert in sorted({int(e) for e in chosen.unique() if e < local}):
        up_UH, down_HI = matrices(expert)
        for row, slot in (chosen == expert).nonzero().tolist():
            gate, up = (up_UH @ x[row].double().cpu()).chunk(2)
            out[row] += float(weights[row, slot]) * (down_HI @ (torch.nn.functional.silu(gate) * up))
    return out


def _grouped(
    x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, up_EUH: torch.Tensor, down_EHI: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The same by torch's grouped_mm: pairs sorted by expert, those of no expert behind them."""
    top_k, experts = places.shape[1], len(up_EUH)
    up_EHU, down_EIH = up_EUH.transpose(1, 2), down_EHI.transpose(1, 2)
    edges = torch.arange(experts, device="cuda", dtype=places.dtype)

    def call() -> torch.Tensor:
        sorted_P, order_P = places.reshape(-1).sort()
        ends_E = torch.searchsorted(sorted_P, edges, right=True).to(torch.int32)
        gate_PI, up_PI = torch.nn.functional.grouped_mm(x[order_P // top_k], up_EHU, offs=ends_E).chunk(2, -1)
        y_PH = torch.nn.functional.grouped_mm(
            torch.nn.functional.silu(gate_PI) * up_PI, down_EIH, offs=ends_E
        )
        y_PH = torch.where((sorted_P < experts)[:, None], y_PH * weights.reshape(-1)[order_P, None], 0.0)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order_P // top_k, y_PH.float())

    return call
