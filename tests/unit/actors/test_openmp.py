"""The OpenMP runtime of computing processes: found, used before any other, and removed from /dev/shm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors import openmp

needed = pytest.mark.skipif(openmp.library() is None, reason="intel-openmp is not installed")


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
