"""Loads some experts of one layer into the memory of the kernel that will run them.

One expert at a time goes from the mapped file into its place: the layer is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import structlog
import torch

from actors import bf16_kernel, cuda_layer
from actors.cuda_layer import CudaLayer
from actors.expert_kernels import GroupedLayer, LayerExperts, ModuleLayer, NoopLayer, VllmCpuLayer
from actors.expert_maths import ExpertMaths, layer_maths
from actors.expert_reader import ReadVariant, open_layer
from actors.reserved_memory import release
from actors.slot_format import SlotFormat
from actors.stored_expert import ExpertMatrices
from actors.vllm_cpu_kernel import vllm_cpu_isa, vllm_cpu_ops
from cluster.checkpoint import Checkpoint
from cluster.errors import HostError

log = structlog.get_logger()

KERNELS: Final = (
    "auto",
    "bf16-weights",
    "vllm-cpu",
    "vllm-cpu-amx",
    "vllm-cpu-vec",
    "grouped-mm",
    "module",
    "vllm-cuda",
    "vllm-cuda-fp8",
    "vllm-cuda-int8",
    "noop",
)


def build_layer(
    checkpoint: Checkpoint,
    layer: int,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    kernel: str = "auto",
    room: int = 0,
    variant: ReadVariant | None = None,
) -> LayerExperts:
    """Load ``experts`` of ``layer``; slot i of the result's ``compute`` is ``experts[i]``.

    ``room``: slots that there shall be for experts that may come later, where they cost nothing. ``variant`` reads
    experts that are not the base checkpoint's.

    ``kernel``: ``auto`` takes ``bf16-weights`` for float32 rows over bfloat16 files where it can, else vLLM's
    kernel where stock vLLM would run it, else ``bf16-weights`` for bfloat16 rows, else ``grouped-mm``; on a GPU
    vLLM's (``vllm-cuda``) where it can, else ``module``. ``noop`` loads
    nothing. Raises CheckpointError for unreadable or unsupported weights and HostError for a kernel that
    cannot run this layer.
    """
    if kernel == "noop":
        return NoopLayer()
    maths = layer_maths(checkpoint, layer)
    return pack_layer(checkpoint, layer, maths, experts, dtype, device, kernel, room, variant)


def pack_layer(
    checkpoint: Checkpoint,
    layer: int,
    maths: ExpertMaths,
    experts: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    kernel: str = "auto",
    room: int = 0,
    variant: ReadVariant | None = None,
) -> LayerExperts:
    """:func:`build_layer` for known maths; the choice of the kernel is made here."""
    made = _empty(checkpoint, layer, maths, len(experts), dtype, device, kernel)
    if made.roomy and room > len(experts):
        try:
            made = made.sized(room)
        except OSError as error:
            # As large as they must be, and made anew when others come.
            log.warning("no room for experts that may come", layer=layer, reason=str(error))
    with open_layer(checkpoint, layer, maths, variant) as read:
        for slot, expert in enumerate(experts):
            made.put(slot, read(expert))
    if isinstance(made, VllmCpuLayer):
        made.loaded()
    return made


def rebuilt_layer(
    old: LayerExperts,
    slot_of: Mapping[int, int],
    experts: Sequence[int],
    read: Callable[[int], ExpertMatrices] | None,
    pause: Callable[[int], None] = lambda size: None,
) -> LayerExperts:
    """A layer of the same kind as `old`, which keeps computing meanwhile, with other experts.

    `slot_of` says which experts `old` has, and where: those are copied in memory, the others are `read`. `pause` is
    called after each that was read, with its bytes.
    """
    made = old.sized(len(experts))
    size = made.weight_bytes // max(1, len(experts))
    for slot, expert in enumerate(experts):
        if expert in slot_of:
            for new, before in zip(made.stores, old.stores, strict=True):
                new[slot].copy_(before[slot_of[expert]])
        else:
            assert read is not None
            made.put(slot, read(expert))
            pause(size)
    if isinstance(made, VllmCpuLayer):
        made.loaded()
    return made


def free(layer: LayerExperts, slots: Collection[int]) -> None:
    """Give the memory of slots back that nobody computes with any more."""
    for slot in slots:
        if isinstance(layer, CudaLayer):
            layer.free(slot)
            continue
        for store in layer.stores:
            release(store[slot])


def _empty(
    checkpoint: Checkpoint,
    layer: int,
    maths: ExpertMaths,
    num: int,
    dtype: torch.dtype,
    device: str,
    kernel: str,
) -> LayerExperts:
    if kernel not in KERNELS:
        raise HostError(f"no kernel of the name {kernel!r}", f"known are {', '.join(KERNELS)}")
    on_gpu = device != "cpu"
    if on_gpu and cuda_layer.can_run(maths) and (kernel == "auto" or kernel.startswith("vllm-cuda")):
        weights = kernel.removeprefix("auto").removeprefix("vllm-cuda").removeprefix("-") or "plain"
        form = SlotFormat.of(maths, dtype, weights)
        of_model = next(known.num_experts for known in checkpoint.moe_layers if known.index == layer)
        return CudaLayer(form, num, torch.device(device).index or 0, of_model)
    if kernel == "module" or (kernel == "auto" and on_gpu):
        return ModuleLayer(maths, num, dtype, device)
    if on_gpu:
        raise HostError(
            f"the kernel {kernel!r} cannot run layer {layer} of {checkpoint.path} on {device!r}",
            "use kernel auto",
        )
    narrow = bf16_kernel.can_run(maths, dtype, checkpoint.stored_dtypes(layer))
    if narrow and (kernel == "bf16-weights" or (kernel == "auto" and dtype == torch.float32)):
        return bf16_kernel.Bf16WeightsLayer(num, maths.hidden, maths.intermediate)
    isa = None if kernel == "grouped-mm" else vllm_cpu_isa(maths, dtype)
    if isa is not None and kernel in ("auto", "vllm-cpu", f"vllm-cpu-{isa}"):
        ops = vllm_cpu_ops()
        assert ops is not None
        return VllmCpuLayer(ops, isa, maths, num, dtype)
    if narrow and kernel == "auto":
        # Beside an engine on a GPU, whose vLLM has no kernel for CPUs.
        return bf16_kernel.Bf16WeightsLayer(num, maths.hidden, maths.intermediate)
    if kernel in ("auto", "grouped-mm"):
        return GroupedLayer(maths, num, dtype)
    raise HostError(
        f"the kernel {kernel!r} cannot run layer {layer} of {checkpoint.path} in {dtype} here",
        f"vLLM's choice here is {isa or 'none'}; use kernel auto",
    )
