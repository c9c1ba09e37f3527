"""The OpenMP runtime of computing processes: found, used before torch's own, and nothing left in /dev/shm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors import openmp

needed = pytest.mark.skipif(openmp.library() is None, reason="intel-openmp is not installed")


@needed
def test_a_killed_process_leaves_nothing_in_shared_memory() -> None:
    program = (
        "import os; from actors import openmp; openmp.load(); import torch; torch.set_num_threads(2);"
        "torch.ones(1000, 1000) @ torch.ones(1000, 1000); maps = open('/proc/self/maps').read();"
        "print('libiomp5' in maps, os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    loaded, pid = run.stdout.split()
    assert loaded == "True"
    assert not list(Path("/dev/shm").glob(f"*KMP_REGISTERED_LIB_{pid}_*"))


@needed
def test_a_preload_comes_before_what_there_was_and_once() -> None:
    environment = {"LD_PRELOAD": "/lib/other.so"}
    openmp.preload(environment)
    openmp.preload(environment)
    assert environment["LD_PRELOAD"] == f"{openmp.library()}:/lib/other.so"


def test_what_a_killed_process_left_is_removed() -> None:
    # No process has this number: it is above the kernel's limit.
    left = Path(f"/dev/shm/__KMP_REGISTERED_LIB_{1 << 23}_{os.getuid()}")
    left.touch()
    openmp.remove_registration_of(1 << 23)
    assert not left.exists()
