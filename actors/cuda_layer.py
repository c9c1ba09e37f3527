"""The experts of a layer on a GPU, in slots that engines on the same GPU can map (`actors.cuda_memory`).

The host computes for engines elsewhere; an engine on its GPU takes the weights and computes itself, which spares it
the way there and back.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Final

import torch

from actors.cuda_memory import CudaSlots, gpu_name
from actors.expert_maths import ExpertMaths
from actors.slot_format import SlotFormat, run_experts, skipping
from actors.stored_expert import ExpertMatrices

_ACTIVATIONS: Final = ("silu", "gelu")
# Between two waits for the GPU, so that waiting is little of what is measured.
_FEWEST_RUNS: Final = 8


def can_run(maths: ExpertMaths) -> bool:
    """Whether vLLM's fused experts compute these."""
    plain = maths.has_gate and not maths.has_bias and maths.activation in _ACTIVATIONS
    return plain and find_spec("vllm") is not None


class CudaLayer:
    """Some experts of one layer, see `actors.expert_kernels.LayerExperts`."""

    roomy = True

    def __init__(self, form: SlotFormat, num_experts: int, device: int, tuned_for: int | None = None) -> None:
        """Room for experts of this format; memory is taken when they are loaded.

        `tuned_for`: how many the model's layer has, see `actors.slot_format.run_experts`.
        """
        self.form, self.room, self.tuned_for = form, num_experts, tuned_for
        self.kernel = "vllm-cuda" if form.weights == "plain" else f"vllm-cuda-{form.weights}"
        self.slots = CudaSlots(device, num_experts, form.size)
        self.weight_bytes = self.slots.slot_bytes * num_experts
        self.tensors = form.tensors(self.slots.bytes()[:num_experts])
        self._device = torch.device("cuda", device)
        self.gpu = gpu_name(device)
        # Kernels are given the address of the first slot, which must be one even while no expert is there.
        self.slots.take(0)
        # An engine asks a host for what it has: most pairs are others'.
        self.skipping_S = skipping(num_experts, self._device)
        self._buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def stores(self) -> tuple[torch.Tensor, ...]:
        """See `actors.expert_kernels.LayerExperts`."""
        return tuple(tensor for tensor in self.tensors if tensor is not None)

    def put(self, slot: int, matrices: ExpertMatrices) -> None:
        """See `actors.expert_kernels.LayerExperts`. What engines have mapped of the slot before stays theirs."""
        self.slots.take(slot)
        self.form.put(self.tensors, slot, matrices)

    def free(self, slot: int) -> None:
        """Give a slot's memory back."""
        torch.cuda.synchronize(self._device)
        if slot:
            self.slots.release(slot)

    def sized(self, num_experts: int) -> CudaLayer:
        """See `actors.expert_kernels.LayerExperts`."""
        assert self._device.index is not None
        return CudaLayer(self.form, num_experts, self._device.index, self.tuned_for)

    @torch.inference_mode()
    def device_seconds(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, seconds: float
    ) -> float:
        """How long the GPU takes for these rows, as engines on it have it: in a graph, without the way there and back.

        The mean of as many as fit into about `seconds`: others may be using the GPU, and take turns.
        """
        x, slots, weights = (tensor.to(self._device) for tensor in (x_NH, slots_NK, weights_NK))
        with torch.cuda.stream(torch.cuda.Stream(self._device)):

            def run() -> None:
                run_experts(
                    self.tensors, self.form.activation, x, slots, weights, self.skipping_S, self.tuned_for
                )

            run()
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
            runs, began = 0, time.perf_counter()
            while runs < _FEWEST_RUNS or time.perf_counter() - began < seconds:
                for _ in range(_FEWEST_RUNS):
                    graph.replay()
                torch.cuda.current_stream().synchronize()
                runs += _FEWEST_RUNS
            return (time.perf_counter() - began) / runs

    @torch.inference_mode()
    def compute(
        self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor, out_NH: torch.Tensor
    ) -> None:
        """See `actors.expert_kernels.LayerExperts`; returns when ``out_NH`` is written."""
        rows = x_NH.shape[0]
        if not rows:
            return
        if (
            self._buffers is None
            or len(self._buffers[0]) < rows
            or self._buffers[1].shape[1] != slots_NK.shape[1]
        ):
            room, width = 1 << max(4, (rows - 1).bit_length()), slots_NK.shape[1]
            self._buffers = (
                torch.empty(room, x_NH.shape[1], dtype=x_NH.dtype, device=self._device),
                torch.empty(room, width, dtype=torch.int32, device=self._device),
                torch.empty(room, width, dtype=torch.float32, device=self._device),
            )
        x, slots, weights = (buffer[:rows] for buffer in self._buffers)
        x.copy_(x_NH)
        slots.copy_(slots_NK)
        weights.copy_(weights_NK)
        absent = slots < 0
        weights.masked_fill_(absent, 0.0)
        slots.masked_fill_(absent, self.room)
        out_NH.copy_(
            run_experts(
                self.tensors, self.form.activation, x, slots, weights, self.skipping_S, self.tuned_for
            )
        )
