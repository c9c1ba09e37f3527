"""An entry of /dev/shm is left behind once nobody holds it any more."""

from __future__ import annotations

import multiprocessing
import uuid
from pathlib import Path

import pytest

from workloads.bench.shared_memory import left_behind, names

FOLDER = Path("/dev/shm")


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm")
def test_what_nobody_holds_is_left_behind() -> None:
    before = names()
    path = FOLDER / f"expertmesh-test-{uuid.uuid4().hex}"
    try:
        with path.open("wb"):
            assert path.name in names() and path.name not in left_behind(before)
        assert path.name in left_behind(before) and path.name not in left_behind(names())
    finally:
        path.unlink()
    assert path.name not in left_behind(before)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm")
def test_a_semaphore_is_held_by_the_process_that_made_it() -> None:
    before = names()
    # With "spawn" its name stays for as long as it is used.
    lock = multiprocessing.get_context("spawn").Lock()
    fresh = names().difference(before)
    assert any(name.startswith("sem.") for name in fresh) and not left_behind(before), lock
