"""Weights' memory: nothing until it is written, nothing after it is given back, and neighbours stay as they are."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from actors.reserved_memory import release, reserved

MIB = 2**20


def resident() -> int:
    """Bytes of this process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_slots_cost_memory_only_while_they_are_loaded() -> None:
    before = resident()
    slots = reserved(64, 8 * MIB // 4, dtype=torch.float32)
    assert resident() - before < 16 * MIB
    slots[3:7] = 1.5
    loaded = resident() - before
    assert 24 * MIB < loaded < 64 * MIB
    release(slots[4])
    release(slots[5])
    assert resident() - before < loaded - 8 * MIB
    assert (slots[3] == 1.5).all() and (slots[6] == 1.5).all()
    assert (slots[4:6] == 0).all()


def test_pages_that_are_shared_with_neighbours_stay() -> None:
    odd = mmap.PAGESIZE // 4 + 100
    slots = reserved(8, odd, dtype=torch.float32)
    slots[:] = 2.0
    release(slots[4])
    kept = [slot for slot in range(8) if slot != 4]
    assert (slots[kept] == 2.0).all()


def test_nothing_is_a_size_too() -> None:
    assert reserved(0, 5, dtype=torch.bfloat16).shape == (0, 5)
    release(reserved(4, 0, dtype=torch.bfloat16))
