"""A process that takes another's place: the idle policy while it starts, the usual one after."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from actors import gentle_start

PROGRAM = """
import os, threading, time
from actors import gentle_start
stop = threading.Event()
other = threading.Thread(target=stop.wait); other.start()
def policies(): return sorted({os.sched_getscheduler(t.native_id) for t in threading.enumerate()})
seen = []
gentle_start.lower(); seen.append(policies())
late = threading.Thread(target=stop.wait); late.start(); seen.append(policies())
gentle_start.restore(); seen.append(policies())
gentle_start.lower(patience_s=0.01)
deadline = time.monotonic() + 30
while policies() != [os.SCHED_OTHER] and time.monotonic() < deadline: time.sleep(0.01)
seen.append(policies())
gentle_start.give_way(); seen.append(policies())
stop.set(); print(seen)
"""
IDLE, OTHER = [os.SCHED_IDLE], [os.SCHED_OTHER]


@pytest.mark.skipif(not gentle_start.may_return(), reason="this process may not leave the idle policy again")
def test_all_threads_give_way_until_they_are_restored_or_have_waited_long_enough() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == str([IDLE, IDLE, OTHER, OTHER, IDLE]), run.stderr


def test_without_permission_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def refuse(thread: int, policy: int, _: os.sched_param) -> None:
        asked.append((thread, policy))
        if policy != os.SCHED_IDLE:
            raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert not gentle_start.lower()
    # Only the thread that tried was touched, and it has ended.
    assert asked == [(0, os.SCHED_IDLE), (0, os.SCHED_OTHER)]
    assert len(list(Path("/proc/self/task").iterdir())) >= threading.active_count()
