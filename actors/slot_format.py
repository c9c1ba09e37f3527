"""How one expert lies in a slot of GPU memory, and the tensors that a kernel sees over many slots.

Letters: S slots, H hidden, I intermediate, U = 2·I (gate and up, one behind the other).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from actors.expert_maths import ExpertMaths
from actors.stored_expert import ExpertMatrices

_ALIGN: Final = 256
_TILES: Final = threading.Lock()
_LARGEST: Final = {"fp8": 448.0, "int8": 127.0}
_STORED: Final = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
WEIGHTS: Final = ("plain", *_STORED)
"""As the rows, or 8 bits with one float32 scale per output."""


class SlotTensors(NamedTuple):
    """The experts of all slots: strided views of one range of memory."""

    up_SUH: torch.Tensor
    down_SHI: torch.Tensor
    up_scale_SU: torch.Tensor | None
    down_scale_SH: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class SlotFormat:
    """Sizes and types; two processes that share slots must agree on all of it."""

    hidden: int
    intermediate: int
    dtype: str
    """Of the rows."""
    weights: str
    """One of WEIGHTS."""
    activation: str
    """silu or gelu, over gate and up."""

    @classmethod
    def of(cls, maths: ExpertMaths, dtype: torch.dtype, weights: str) -> SlotFormat:
        assert maths.activation is not None
        name = str(dtype).removeprefix("torch.")
        return cls(maths.hidden, maths.intermediate, name, weights, maths.activation)

    @property
    def stored(self) -> torch.dtype:
        """Of the weights."""
        plain: torch.dtype = getattr(torch, self.dtype)
        return _STORED.get(self.weights, plain)

    def _offsets(self) -> tuple[int, int, int, int]:
        """Where up's weights end, down's, up's scales and down's, in bytes, each padded."""
        item, up = self.stored.itemsize, 2 * self.intermediate
        sizes = [up * self.hidden * item, self.hidden * self.intermediate * item, 0, 0]
        if self.weights != "plain":
            sizes[2:] = [up * 4, self.hidden * 4]
        ends, end = [], 0
        for size in sizes:
            end += -(-size // _ALIGN) * _ALIGN
            ends.append(end)
        return ends[0], ends[1], ends[2], ends[3]

    @property
    def size(self) -> int:
        """Bytes of one expert."""
        return self._offsets()[-1]

    def tensors(self, slots: torch.Tensor) -> SlotTensors:
        """Views of uint8 [S, bytes per slot]."""
        count, step = slots.shape
        up_end, down_end, scale_end, _ = self._offsets()
        up, hidden, inner = 2 * self.intermediate, self.hidden, self.intermediate

        def view(dtype: torch.dtype, offset: int, *shape: int) -> torch.Tensor:
            flat, item = slots.reshape(-1).view(dtype), dtype.itemsize
            strides = [step // item, *(shape[1:] if len(shape) == 2 else ()), 1]
            return flat.as_strided((count, *shape), strides, offset // item)

        scales: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if self.weights != "plain":
            scales = view(torch.float32, down_end, up), view(torch.float32, scale_end, hidden)
        return SlotTensors(
            view(self.stored, 0, up, hidden), view(self.stored, up_end, hidden, inner), *scales
        )

    def put(self, tensors: SlotTensors, slot: int, matrices: ExpertMatrices) -> None:
        """Load one expert into a slot, in 8 bits if the format says so."""
        up_UH, down_HI = tensors.up_SUH[slot], tensors.down_SHI[slot]
        if self.weights == "plain":
            matrices.copy_up(up_UH, alternate=False)
            down_HI.copy_(matrices.down_HI)
            return
        assert tensors.up_scale_SU is not None and tensors.down_scale_SH is not None
        whole = torch.empty(up_UH.shape, dtype=torch.float32, device=up_UH.device)
        matrices.copy_up(whole, alternate=False)
        quantise(whole, self.weights, up_UH, tensors.up_scale_SU[slot])
        down = matrices.down_HI.to(device=down_HI.device, dtype=torch.float32)
        quantise(down, self.weights, down_HI, tensors.down_scale_SH[slot])


def quantise(matrix_OI: torch.Tensor, weights: str, out_OI: torch.Tensor, scale_O: torch.Tensor) -> None:
    """Write a float32 matrix in 8 bits, with the scale of each output that makes its largest weight fit."""
    largest = _LARGEST[weights]
    scale_O.copy_((matrix_OI.abs().amax(dim=1) / largest).clamp_min_(1e-12))
    scaled = matrix_OI / scale_O[:, None]
    if weights == "int8":
        scaled.round_()
    out_OI.copy_(scaled.clamp_(-largest, largest))


def run_experts(
    tensors: SlotTensors,
    activation: str,
    x_NH: torch.Tensor,
    places_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    skipping_S: torch.Tensor | None,
    tuned_for: int | None = None,
) -> torch.Tensor:
    """vLLM's fused experts on the GPU: per row the sum of weight × expert in a slot.

    Places are int32 up to the number of slots that the tensors have: the one behind them must be zeros, for pairs of
    experts that are elsewhere. With `skipping_S` (see :func:`skipping`) such pairs are left out instead, which costs
    a few microseconds and pays where there are many. `tuned_for`: the number of experts whose tile sizes are used,
    where that is not the number of slots: vLLM has them for those of models, and engines must compute as hosts do.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    with _tiles(tensors, len(x_NH), places_NK.shape[1], tuned_for):
        return fused_experts(
            x_NH,
            tensors.up_SUH,
            tensors.down_SHI,
            weights_NK,
            places_NK,
            activation=_activation(activation),
            global_num_experts=len(tensors.up_SUH) + 1,
            expert_map=skipping_S,
            quant_config=_quantisation(tensors),
        )


@contextmanager
def _tiles(tensors: SlotTensors, rows: int, top_k: int, experts: int | None) -> Iterator[None]:
    """Have vLLM take the tile sizes of so many experts."""
    up_SUH, down_SHI = tensors[:2]
    if experts is None or experts == len(up_SUH) or not rows:
        yield
        return
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    kind = {torch.float32: "float32", torch.bfloat16: None}.get(up_SUH.dtype, "int8_w8a16")
    up, down = ((experts, *tensor.shape[1:]) for tensor in (up_SUH, down_SHI))
    # What it is told to take is one for the process, and a host has several threads that compute.
    with _TILES, override_config(try_get_optimal_moe_config(up, down, top_k, kind, rows)):
        yield


def skipping(slots: int, device: torch.device) -> torch.Tensor:
    """int32 [slots + 1] that says that the place behind so many slots is none."""
    places = torch.arange(slots + 1, dtype=torch.int32, device=device)
    places[slots] = -1
    return places


def _activation(name: str) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return MoEActivation.from_str(name)


def _quantisation(tensors: SlotTensors) -> Any:
    if tensors.up_scale_SU is None or tensors.down_scale_SH is None:
        return None
    from vllm.model_executor.layers.fused_moe.config import int8_w8a16_moe_quant_config

    # Its kernel widens the weights as it reads them, whichever of the 8-bit types they have.
    return int8_w8a16_moe_quant_config(w1_scale=tensors.up_scale_SU, w2_scale=tensors.down_scale_SH)
