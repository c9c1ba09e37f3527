"""What an expert host runs per layer and step: several implementations of one call, :class:`LayerExperts`.

``vllm-cpu-amx`` and ``vllm-cpu-vec`` run vLLM's own CPU kernel over weights packed once at load, so they
give the bits that stock vLLM gives. ``bf16-weights`` (`actors.bf16_kernel`) multiplies float32 rows by bfloat16
weights. ``grouped-mm`` runs any expert that transformers can describe. ``noop``
measures the way there and back. All add a row's local shares in float32 and write into the caller's buffer.

Letters: N rows, K slots a row (top-k), P = local (row, slot) pairs, E local experts, H hidden,
I intermediate, U = 2·I with a gate and I without.
"""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch

from actors.expert_maths import ExpertMaths
from actors.reserved_memory import reserved
from actors.stored_expert import ExpertMatrices
from actors.vllm_cpu_kernel import VllmCpuOps, padded_intermediate


class LayerExperts(Protocol):
    """Some experts of one layer, loaded and ready."""

    kernel: str
    """Name of the implementation."""
    weight_bytes: int
    """Bytes of the weights of all slots, packed as the kernel wants them."""
    room: int
    """Number of slots."""
    roomy: bool
    """Whether slots cost no memory until they are loaded, and none when they are given back."""

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """Write per row the sum over its local slots of weight × expert(row), zeros where none is local.

        ``x_NH`` and ``out_NH`` have the layer's dtype; ``slots_NK`` is int32, a position among the loaded
        experts or -1 for "not here"; ``weights_NK`` is float32. All are contiguous CPU tensors, maybe in
        shared memory; ``out_NH`` must not overlap ``x_NH``.
        """
        ...

    @property
    def stores(self) -> tuple[torch.Tensor, ...]:
        """Every tensor of weights, whose first dimension is the slot."""

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """Load one expert into a slot."""

    def sized(self, num_experts: int) -> LayerExperts:
        """A layer of the same kind with so many slots, which hold nothing yet."""


@runtime_checkable
class Plain(Protocol):
    """A layer whose kernel keeps matrices that other hosts can copy."""

    def parts(self, slot: int) -> dict[str, torch.Tensor]:
        """One expert's tensors as [out, in], named as in `actors.stored_expert`."""


class PairBuffers:
    """Buffers that grow to the largest number of pairs seen and are kept from step to step."""

    def __init__(self, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._widths = widths
        self._sum = torch.empty(0)
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._capacity = -1

    def take(self, pairs: int) -> tuple[torch.Tensor, ...]:
        """One uninitialised [pairs, width] tensor per width, valid until the next call."""
        if pairs > self._capacity:
            # Powers of two, so that slowly growing batches don't reallocate at every step.
            self._capacity = 1 << max(4, (pairs - 1).bit_length())
            self._buffers = tuple(
                torch.empty(self._capacity, width, dtype=self._dtype) for width in self._widths
            )
        return tuple(buffer[:pairs] for buffer in self._buffers)

    def add_pairs(self, rows_P: torch.Tensor, y_PH: torch.Tensor, out_NH: torch.Tensor) -> None:
        """out[row] = sum of that row's pairs, added in float32 and rounded once."""
        if out_NH.dtype == torch.float32:
            out_NH.zero_().index_add_(0, rows_P, y_PH)
            return
        if self._sum.numel() < out_NH.numel():
            self._sum = torch.empty(out_NH.numel())
        sum_NH = self._sum[: out_NH.numel()].view(out_NH.shape)
        sum_NH.zero_().index_add_(0, rows_P, y_PH.float())
        out_NH.copy_(sum_NH)


class VllmCpuLayer:
    """vLLM's CPU kernel over packed weights: w13 [E, 2I, H], w2 [E, H, I], biases alike if there are any."""

    roomy = True

    def __init__(
        self, ops: VllmCpuOps, isa: str, maths: ExpertMaths, num_experts: int, dtype: torch.dtype
    ) -> None:
        assert maths.activation is not None
        hidden, padded = maths.hidden, padded_intermediate(maths)
        w13 = reserved(num_experts, 2 * padded, hidden, dtype=dtype)
        w2 = reserved(num_experts, hidden, padded, dtype=dtype)
        b13 = reserved(num_experts, 2 * padded, dtype=dtype) if maths.has_bias else None
        b2 = reserved(num_experts, hidden, dtype=dtype) if maths.has_bias else None
        self.room = num_experts
        self.kernel = f"vllm-cpu-{isa}"
        self._ops, self._isa, self._maths, self._activation = ops, isa, maths, maths.activation
        self._op = ops.fused_moe
        self._packed: Final = (w13, w2, b13, b2)
        self.stores = tuple(tensor for tensor in self._packed if tensor is not None)
        self.weight_bytes = sum(tensor.nbytes for tensor in self.stores)
        # One expert before packing; zeros stay where the padding is.
        self._staged: tuple[torch.Tensor, torch.Tensor] | None = None
        self._buffers = PairBuffers(dtype, (hidden, hidden))

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """See :class:`LayerExperts`."""
        w13, w2, b13, b2 = self._packed
        up, down = self._staged = self._staged or (torch.zeros_like(w13[:1]), torch.zeros_like(w2[:1]))
        alternate = self._activation == "swigluoai"
        matrices.copy_up(up[0], alternate=alternate)
        down[0, :, : self._maths.intermediate].copy_(matrices.down_HI)
        self._ops.prepack(up, w13[slot : slot + 1], self._isa)
        self._ops.prepack(down, w2[slot : slot + 1], self._isa)
        if b13 is not None and b2 is not None and matrices.down_H is not None:
            matrices.copy_up_bias(b13[slot], alternate=alternate)
            b2[slot].copy_(matrices.down_H)

    def loaded(self) -> None:
        """Give back what loading took."""
        self._staged = None

    def sized(self, num_experts: int) -> VllmCpuLayer:
        """See :class:`LayerExperts`."""
        return VllmCpuLayer(self._ops, self._isa, self._maths, num_experts, self.stores[0].dtype)

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See :class:`LayerExperts`. With every slot local this is one kernel call, as in stock vLLM."""
        slots = slots_NK.numpy()
        # numpy's tests and selections cost a third of torch's on arrays this small.
        if slots.size and slots.min() >= 0:
            self._run(out_NH, x_NH, weights_NK, slots_NK)
            return
        flat = slots.reshape(-1)
        pairs = np.flatnonzero(flat >= 0)
        if pairs.size == 0:
            out_NH.zero_()
            return
        # The kernel takes no "absent" slot. A single row is called with fewer slots; of several rows, each
        # local pair becomes a row of its own with top-k 1.
        ids_P = torch.from_numpy(flat[pairs])
        weights_P = torch.from_numpy(weights_NK.numpy().reshape(-1)[pairs])
        if slots.shape[0] == 1:
            self._run(out_NH, x_NH, weights_P[None], ids_P[None])
            return
        rows_P = torch.from_numpy(pairs // slots.shape[1])
        x_PH, y_PH = self._buffers.take(pairs.size)
        torch.index_select(x_NH, 0, rows_P, out=x_PH)
        self._run(y_PH, x_PH, weights_P[:, None], ids_P[:, None])
        self._buffers.add_pairs(rows_P, y_PH, out_NH)

    def _run(self, out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        self._op(out, x, *self._packed, weights, ids, False, self._activation, self._isa)


class GroupedLayer:
    """Any expert, on CPU: pairs sorted by expert, one matrix product per expert that was hit.

    Measured against transformers' ``grouped_mm`` (the same or up to three times faster) and ``batched_mm``
    (up to ten times faster for experts of real size: that one copies an expert's weights for every pair).
    ``up_EUH`` has the row order that the model's own gate wants.
    """

    kernel = "grouped-mm"
    roomy = True

    def __init__(self, maths: ExpertMaths, num_experts: int, dtype: torch.dtype) -> None:
        up_EUH = reserved(num_experts, maths.up_rows, maths.hidden, dtype=dtype)
        down_EHI = reserved(num_experts, maths.hidden, maths.intermediate, dtype=dtype)
        up_bias_EU = reserved(num_experts, maths.up_rows, dtype=dtype) if maths.has_bias else None
        down_bias_EH = reserved(num_experts, maths.hidden, dtype=dtype) if maths.has_bias else None
        self.room = num_experts
        tensors = (up_EUH, down_EHI, up_bias_EU, down_bias_EH)
        self.stores = tuple(tensor for tensor in tensors if tensor is not None)
        self.weight_bytes = sum(tensor.nbytes for tensor in self.stores)
        self._maths = maths.loaded()
        self._activate = self._maths.activate
        self._first = "gate_up" if maths.has_gate else "up"
        # Views made once: a view per expert and step would cost more than the product of a small batch.
        self._up = [matrix.t() for matrix in up_EUH]
        self._down = [matrix.t() for matrix in down_EHI]
        self._up_bias = None if up_bias_EU is None else list(up_bias_EU)
        self._down_bias = None if down_bias_EH is None else list(down_bias_EH)
        hidden, up_rows = maths.hidden, maths.up_rows
        self._buffers = PairBuffers(dtype, (hidden, up_rows, hidden))

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """See :class:`LayerExperts`."""
        _fill(matrices, self._maths, *(store[slot] for store in self.stores))

    def sized(self, num_experts: int) -> GroupedLayer:
        """See :class:`LayerExperts`."""
        return GroupedLayer(self._maths, num_experts, self.stores[0].dtype)

    def parts(self, slot: int) -> dict[str, torch.Tensor]:
        """See :class:`Plain`."""
        parts = {self._first: self._up[slot].t(), "down": self._down[slot].t()}
        if self._up_bias is not None and self._down_bias is not None:
            parts |= {f"{self._first}.bias": self._up_bias[slot], "down.bias": self._down_bias[slot]}
        return parts

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See :class:`LayerExperts`."""
        slots = slots_NK.numpy()
        flat = slots.reshape(-1)
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat + 1, minlength=1)
        pairs = order[counts[0] :]
        if pairs.size == 0:
            out_NH.zero_()
            return
        hit = [(int(expert), int(counts[expert + 1])) for expert in np.flatnonzero(counts[1:])]
        rows_P = torch.from_numpy(pairs // slots.shape[1])
        x_PH, up_PU, y_PH = self._buffers.take(pairs.size)
        torch.index_select(x_NH, 0, rows_P, out=x_PH)
        _multiply(x_PH, self._up, self._up_bias, hit, up_PU)
        _multiply(self._activate(up_PU), self._down, self._down_bias, hit, y_PH)
        weights_P = torch.from_numpy(weights_NK.numpy().reshape(-1)[pairs])
        self._buffers.add_pairs(rows_P, y_PH * weights_P[:, None], out_NH)


def _multiply(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    biases: list[torch.Tensor] | None,
    hit: list[tuple[int, int]],
    out: torch.Tensor,
) -> None:
    start = 0
    for expert, count in hit:
        rows, target = x[start : start + count], out[start : start + count]
        if biases is None:
            torch.mm(rows, matrices[expert], out=target)
        else:
            torch.addmm(biases[expert], rows, matrices[expert], out=target)
        start += count


def _fill(
    matrices: ExpertMatrices,
    maths: ExpertMaths,
    up_UH: torch.Tensor,
    down_HI: torch.Tensor,
    up_U: torch.Tensor | None = None,
    down_H: torch.Tensor | None = None,
) -> None:
    """Copy one expert into its place, with gate and up in the order that the model's own gate wants."""
    alternate = not maths.is_concatenated
    matrices.copy_up(up_UH, alternate=alternate)
    down_HI.copy_(matrices.down_HI)
    if up_U is not None and down_H is not None and matrices.down_H is not None:
        matrices.copy_up_bias(up_U, alternate=alternate)
        down_H.copy_(matrices.down_H)


class ModuleLayer:
    """The model's own experts module with only the local experts, run by transformers' ``grouped_mm``.

    For GPUs: it needs no answer from the device until the result is copied out. Absent slots become the
    index after the last expert, which ``grouped_mm`` skips as it does under expert parallelism.
    """

    kernel = "grouped-mm"
    roomy = False

    def __init__(self, maths: ExpertMaths, num_experts: int, dtype: torch.dtype, device: str) -> None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        self._maths = maths.loaded()
        parameters = {
            name: torch.empty(num_experts, *parameter.shape[1:], dtype=dtype, device=device)
            for name, parameter in self._maths.module.named_parameters()
        }
        self.stores = tuple(parameters.values())
        self.weight_bytes = sum(tensor.nbytes for tensor in self.stores)
        first = "gate_up_proj" if maths.has_gate else "up_proj"
        up, down = parameters[first], parameters["down_proj"]
        if maths.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        biases = [parameters[name] for name in (f"{first}_bias", "down_proj_bias") if name in parameters]
        self._targets = (up, down, *biases)
        module = self._maths.instantiate(parameters, num_experts)
        module._is_expert_parallel = True  # type: ignore[assignment]
        self._module, self._num_experts, self._device = module, num_experts, device
        self.room = num_experts
        self._forward = grouped_mm_experts_forward

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """See :class:`LayerExperts`."""
        _fill(matrices, self._maths, *(target[slot] for target in self._targets))

    def sized(self, num_experts: int) -> ModuleLayer:
        """See :class:`LayerExperts`."""
        return ModuleLayer(self._maths, num_experts, self.stores[0].dtype, self._device)

    @torch.inference_mode()
    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See :class:`LayerExperts`; returns when ``out_NH`` is written."""
        if x_NH.shape[0] == 0:
            return
        slots = slots_NK.to(self._device).long()
        absent = slots < 0
        y_NH = self._forward(
            self._module,
            x_NH.to(self._device),
            slots.masked_fill(absent, self._num_experts),
            weights_NK.to(self._device).masked_fill(absent, 0.0),
        )
        out_NH.copy_(y_NH)


class NoopLayer:
    """No experts at all: what remains is the transport.

    ``weighted`` returns x times the row's local weights, so that the hosts' shares still add up to x where
    the weights add up to one; otherwise the rows come back as they are, the cheapest answer there is.
    """

    kernel = "noop"
    weight_bytes = 0
    room = 1 << 15
    roomy = True
    stores: tuple[torch.Tensor, ...] = ()

    def __init__(self, *, weighted: bool = False) -> None:
        self._weighted = weighted

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """Nothing is kept of it."""

    def sized(self, num_experts: int) -> NoopLayer:
        """See :class:`LayerExperts`."""
        return NoopLayer(weighted=self._weighted)

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See :class:`LayerExperts`."""
        if self._weighted:
            share_N1 = weights_NK.masked_fill(slots_NK < 0, 0.0).sum(dim=1, keepdim=True)
            torch.mul(x_NH, share_N1.to(x_NH.dtype), out=out_NH)
        else:
            out_NH.copy_(x_NH)
