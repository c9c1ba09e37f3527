"""Experts whose bfloat16 weights stay bfloat16 while rows and sums are float32: `native/`, and its layer.

vLLM's kernel wants weights in the rows' dtype, twice the bytes of most checkpoints for a model that is served in
float32. Decoding waits for those bytes. The kernel is compiled at its first use on a machine, in half a second.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import structlog
import torch

from actors.expert_maths import ExpertMaths
from actors.native_library import native_library
from actors.reserved_memory import reserved
from actors.stored_expert import ExpertMatrices
from cluster.errors import HostError

log = structlog.get_logger()

_SOURCE: Final = Path(__file__).parent / "native" / "bf16_experts.cpp"
_FLAGS: Final = ("-O3", "-march=native", "-fopenmp")
_LANES: Final = 16


def can_run(maths: ExpertMaths, dtype: torch.dtype, stored: frozenset[str]) -> bool:
    """Whether the kernel computes these experts: rows of float32, or of bfloat16 that are widened, over bfloat16
    files, a plain silu gate, no bias.
    """
    return (
        dtype in (torch.float32, torch.bfloat16)
        and stored == {"bfloat16"}
        and maths.activation == "silu"
        and not maths.has_bias
        and maths.hidden % (2 * _LANES) == 0
        and maths.intermediate % (2 * _LANES) == 0
        and kernel() is not None
    )


@cache
def kernel() -> Callable[..., None] | None:
    """The compiled function, made first if need be; None, with a warning, where it can't be compiled."""
    try:
        function = native_library("bf16", _SOURCE, _FLAGS).expertmesh_bf16_experts
    except HostError as error:
        log.warning("no bfloat16 kernel: weights are widened in memory", reason=error.message)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer] * 2 + [number] * 3 + [pointer] * 4 + [number] * 4
    function.restype = None
    return function


def pack(matrix_NI: torch.Tensor, out: torch.Tensor) -> None:
    """Write [outputs, inputs] into panels [outputs / 16, inputs / 2, 16, 2], without changing a bit."""
    outputs, inputs = matrix_NI.shape
    # Pairs move as one number of 32 bits, which takes a third of the time.
    pairs = matrix_NI.to(torch.bfloat16).contiguous().view(torch.int32)
    out.view(torch.int32)[..., 0].copy_(pairs.view(outputs // _LANES, _LANES, inputs // 2).transpose(1, 2))


def unpack(panels: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] out of panels."""
    count, pairs = panels.shape[:2]
    return panels.permute(0, 2, 1, 3).reshape(count * _LANES, 2 * pairs)


class Bf16WeightsLayer:
    """Some experts of one layer, see `actors.expert_kernels.LayerExperts`; it computes in float32."""

    kernel = "bf16-weights"
    roomy = True

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, *, vectors_only: bool = False
    ) -> None:
        """Room for experts of these sizes; with `vectors_only` as on a processor without AMX."""
        run = kernel()
        assert run is not None
        panels = intermediate // _LANES
        # Gate and up of the same 16 outputs lie side by side: they are multiplied together.
        self._up = reserved(num_experts, panels, 2, hidden // 2, _LANES, 2, dtype=torch.bfloat16)
        self._down = reserved(
            num_experts, hidden // _LANES, intermediate // 2, _LANES, 2, dtype=torch.bfloat16
        )
        self.room = num_experts
        self.stores = self._up, self._down
        self.weight_bytes = self._up.nbytes + self._down.nbytes
        self._vectors_only = vectors_only
        self._run = run
        self._weights = (
            self._up.data_ptr(),
            self._down.data_ptr(),
            num_experts,
            hidden,
            intermediate,
        )
        self._options = torch.get_num_threads(), int(vectors_only)
        # Rows of bfloat16 and their sums, widened.
        self._wide = torch.empty(0)

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """Load one expert's matrices: bfloat16, or widened by a host that gave them on, which loses nothing."""
        assert matrices.gate_IH is not None
        pack(matrices.gate_IH, self._up[slot, :, 0])
        pack(matrices.up_IH, self._up[slot, :, 1])
        pack(matrices.down_HI, self._down[slot])

    def sized(self, num_experts: int) -> Bf16WeightsLayer:
        """See `actors.expert_kernels.LayerExperts`."""
        _, _, _, hidden, intermediate = self._weights
        made = Bf16WeightsLayer(num_experts, hidden, intermediate, vectors_only=self._vectors_only)
        # Whoever makes it may be another thread, with another number of its own.
        made._options = self._options
        return made

    def parts(self, slot: int) -> dict[str, torch.Tensor]:
        """See `actors.expert_kernels.Plain`."""
        up = self._up[slot]
        return {"gate": unpack(up[:, 0]), "up": unpack(up[:, 1]), "down": unpack(self._down[slot])}

    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See `actors.expert_kernels.LayerExperts`."""
        if x_NH.dtype == torch.bfloat16:
            size = x_NH.numel()
            if self._wide.numel() < 2 * size:
                self._wide = torch.empty(4 * size)
            wide_NH, sums_NH = (self._wide[at : at + size].view(x_NH.shape) for at in (0, size))
            wide_NH.copy_(x_NH)
            self.compute(wide_NH, slots_NK, weights_NK, sums_NH)
            out_NH.copy_(sums_NH)
            return
        self._run(
            *self._weights,
            x_NH.data_ptr(),
            slots_NK.data_ptr(),
            weights_NK.data_ptr(),
            out_NH.data_ptr(),
            *slots_NK.shape,
            *self._options,
        )
