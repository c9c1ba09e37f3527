"""What an expert host runs per layer and step: several implementations of one call, :class:`LayerExperts`.

``vllm-cpu-amx`` and ``vllm-cpu-vec`` run vLLM's own CPU kernel over weights packed once at load, so they
give the bits that stock vLLM gives. ``bf16-weights`` (`actors.bf16_kernel`) multiplies float32 rows by bfloat16
weights. ``grouped-mm`` runs any expert that transformers can describe. ``noop``
measures the way there and back. All add a row's local shares in float32 and write into the caller's buffer.

Letters: N rows, K slots a row (top-k), P = local (row, slot) pairs, E local experts, H hidden,
I intermediate, U = 2·I with a gate and I without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch

from actors.expert_maths import ExpertMaths


class LayerExperts(Protocol):
    """Some experts of one layer, loaded and ready."""

    kernel: str
    """Name of the implementation."""
    weight_bytes: int
    """Bytes held for the weights, packed as the kernel wants them."""

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """Write per row the sum over its local slots of weight × expert(row), zeros where none is local.

        ``x_NH`` and ``out_NH`` have the layer's dtype; ``slots_NK`` is int32, a position among the loaded
        experts or -1 for "not here"; ``weights_NK`` is float32. All are contiguous CPU tensors, maybe in
        shared memory; ``out_NH`` must not overlap ``x_NH``.
        """
        ...


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
    """vLLM's CPU kernel over packed weights: w13 [E, 2I, H], w2 [E, H, I], biases alike or ``None``."""

    def __init__(
        self,
        op: Callable[..., None],
        isa: str,
        activation: str,
        w13: torch.Tensor,
        w2: torch.Tensor,
        b13: torch.Tensor | None,
        b2: torch.Tensor | None,
    ) -> None:
        self.kernel = f"vllm-cpu-{isa}"
        self.weight_bytes = sum(t.nbytes for t in (w13, w2, b13, b2) if t is not None)
        self._op, self._isa, self._activation = op, isa, activation
        self._packed: Final = (w13, w2, b13, b2)
        hidden = w2.shape[1]
        self._buffers = PairBuffers(w2.dtype, (hidden, hidden))

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

    def __init__(
        self,
        maths: ExpertMaths,
        up_EUH: torch.Tensor,
        down_EHI: torch.Tensor,
        up_bias_EU: torch.Tensor | None,
        down_bias_EH: torch.Tensor | None,
    ) -> None:
        tensors = (up_EUH, down_EHI, up_bias_EU, down_bias_EH)
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self._activate = maths.loaded().activate
        self._first = "gate_up" if maths.has_gate else "up"
        # Views made once: a view per expert and step would cost more than the product of a small batch.
        self._up = [matrix.t() for matrix in up_EUH]
        self._down = [matrix.t() for matrix in down_EHI]
        self._up_bias = None if up_bias_EU is None else list(up_bias_EU)
        self._down_bias = None if down_bias_EH is None else list(down_bias_EH)
        hidden, up_rows = maths.hidden, maths.up_rows
        self._buffers = PairBuffers(up_EUH.dtype, (hidden, up_rows, hidden))

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


class ModuleLayer:
    """The model's own experts module with only the local experts, run by transformers' ``grouped_mm``.

    For GPUs: it needs no answer from the device until the result is copied out. Absent slots become the
    index after the last expert, which ``grouped_mm`` skips as it does under expert parallelism.
    """

    kernel = "grouped-mm"

    def __init__(self, module: torch.nn.Module, num_experts: int, device: str) -> None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        self.weight_bytes = sum(parameter.nbytes for parameter in module.parameters())
        module._is_expert_parallel = True  # type: ignore[assignment]
        self._module, self._num_experts, self._device = module, num_experts, device
        self._forward = grouped_mm_experts_forward

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

    def __init__(self, *, weighted: bool = False) -> None:
        self._weighted = weighted

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See :class:`LayerExperts`."""
        if self._weighted:
            share_N1 = weights_NK.masked_fill(slots_NK < 0, 0.0).sum(dim=1, keepdim=True)
            torch.mul(x_NH, share_N1.to(x_NH.dtype), out=out_NH)
        else:
            out_NH.copy_(x_NH)
