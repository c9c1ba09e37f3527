"""torch computes with the OpenMP runtime that is loaded before its own, and nothing of it stays in /dev/shm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors import openmp


@pytest.mark.skipif(openmp.library() is None, reason="intel-openmp is not installed")
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
