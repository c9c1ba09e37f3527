"""How experts lie in slots, on memory of the host: the same views and the same numbers as on a GPU."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest
import torch

from actors.native_library import NATIVE, native_library
from actors.slot_format import WEIGHTS, SlotFormat, SlotTensors, skipping
from actors.stored_expert import ExpertMatrices

HIDDEN, INNER, SLOTS = 96, 40, 5


def form(weights: str, dtype: str = "bfloat16") -> SlotFormat:
    return SlotFormat(HIDDEN, INNER, dtype, weights, "silu")


def random_expert(seed: int) -> ExpertMatrices:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(INNER, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    return ExpertMatrices(gate, up, torch.randn(HIDDEN, INNER, generator=generator).bfloat16())


def memory(of: SlotFormat, padding: int = 512) -> torch.Tensor:
    return torch.zeros(SLOTS, -(-of.size // 512) * 512 + padding, dtype=torch.uint8)


def widened(tensors: SlotTensors, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    up, down = tensors.up_SUH[slot].float(), tensors.down_SHI[slot].float()
    if tensors.up_scale_SU is not None and tensors.down_scale_SH is not None:
        up, down = up * tensors.up_scale_SU[slot][:, None], down * tensors.down_scale_SH[slot][:, None]
    return up, down


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_slot_has_its_own_expert(weights: str, dtype: str) -> None:
    of = form(weights, dtype)
    slots = memory(of)
    tensors = of.tensors(slots)
    experts = [random_expert(slot) for slot in range(SLOTS)]
    for slot in (3, 0, 4, 1, 2):
        of.put(tensors, slot, experts[slot])
    # Relative to a row's largest weight: half a step of 127, or of the 3 bits behind a floating point.
    allowed = {"plain": 0.0, "int8": 0.51 / 127, "fp8": 0.5 / 8}[weights]
    for slot, expert in enumerate(experts):
        assert expert.gate_IH is not None
        up, down = widened(tensors, slot)
        for got, wanted in ((up, torch.cat([expert.gate_IH, expert.up_IH])), (down, expert.down_HI)):
            whole = wanted.float()
            assert ((got - whole).abs() <= allowed * whole.abs().amax(1, keepdim=True)).all()
    assert not slots[:, of.size :].any(), "what lies behind an expert is not its own"


def test_a_view_of_fewer_slots_is_the_same_memory() -> None:
    of = form("plain")
    slots = memory(of)
    fewer, all_ = of.tensors(slots[:2]), of.tensors(slots)
    of.put(all_, 1, random_expert(0))
    assert len(fewer.up_SUH) == 2
    assert torch.equal(fewer.up_SUH[1], all_.up_SUH[1])


def test_an_output_of_zeros_stays_zeros() -> None:
    of = form("int8")
    tensors = of.tensors(memory(of))
    nothing = torch.zeros(INNER, HIDDEN).bfloat16()
    of.put(tensors, 0, ExpertMatrices(nothing, nothing, torch.zeros(HIDDEN, INNER).bfloat16()))
    assert all(not part.any() and part.isfinite().all() for part in widened(tensors, 0))


def test_the_place_behind_the_last_is_none() -> None:
    assert skipping(3, torch.device("cpu")).tolist() == [0, 1, 2, -1]


def test_the_doorbell_is_heard_and_can_be_stopped() -> None:
    wait = native_library("doorbell", NATIVE / "doorbell.cpp", ("-O2",)).expertmesh_wait
    wait.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64]
    wait.restype = ctypes.c_uint32
    words = np.zeros(2, np.uint32)
    number, stop = words.ctypes.data, words.ctypes.data + 4
    heard: list[int] = []
    for spin_us in (0, 10_000_000):
        words[:] = 0

        def listen(spin_us: int = spin_us) -> None:
            seen = 0
            while (found := wait(number, seen, stop, spin_us)) != seen:
                heard.append(found)
                seen = found

        thread = threading.Thread(target=listen)
        thread.start()
        for told in (7, 8):
            words[0] = told
            deadline = time.monotonic() + 10
            while told not in heard:
                assert time.monotonic() < deadline
        words[1] = 1
        thread.join(10)
        assert not thread.is_alive()
        assert heard == [7, 8]
        heard.clear()
