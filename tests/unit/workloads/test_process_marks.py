"""Processes are found by their mark or by their parents, and ended even while they start more."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest

from workloads.bench.process_marks import kill_all, marked

MARK = "EXPERTMESH_TEST_MARK"
# Children whose environment says nothing, as that of Ray's agents does once they gave themselves a title. They
# hold their parent's standard output open for as long as they live.
ONE = """
import subprocess, time
print(subprocess.Popen(['sleep', '600'], env={}).pid, flush=True)
time.sleep(600)
"""
MORE_AND_MORE = """
import subprocess, time
for n in range(60):
    child = subprocess.Popen(['sleep', '600'], env={})
    if n == 3:
        print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def parent(mark: str, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", request.param], env={MARK: mark}, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def first_child(parent: subprocess.Popen[str]) -> int:
    assert parent.stdout is not None
    return int(parent.stdout.readline())


@pytest.mark.parametrize("parent", [ONE], indirect=True)
def test_a_descendant_without_the_mark_is_found(mark: str, parent: subprocess.Popen[str]) -> None:
    child = first_child(parent)
    assert [process.pid for process in marked(MARK, mark)] == sorted([parent.pid, child])
    assert kill_all(lambda: marked(MARK, mark), 30) == []
    parent.communicate(timeout=30)  # which ends when nobody has the output open any more


@pytest.mark.parametrize("parent", [MORE_AND_MORE], indirect=True)
def test_what_is_being_started_does_not_escape(mark: str, parent: subprocess.Popen[str]) -> None:
    first_child(parent)
    assert kill_all(lambda: marked(MARK, mark), 30) == []
    parent.communicate(timeout=30)


@pytest.mark.parametrize("parent", [ONE], indirect=True)
def test_what_has_ended_and_waits_for_its_parent_is_not_found(
    mark: str, parent: subprocess.Popen[str]
) -> None:
    child = psutil.Process(first_child(parent))
    child.kill()
    deadline = time.monotonic() + 30
    while child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [process.pid for process in marked(MARK, mark)] == [parent.pid]


def test_nothing_found_is_nothing_left() -> None:
    assert kill_all(list, 30) == []
