"""A process that takes another's place: a low priority while it starts, the usual one after."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from actors import gentle_start

PROGRAM = """
import os, threading, sys
from actors import gentle_start
stop = threading.Event()
other = threading.Thread(target=stop.wait); other.start()
seen = []
def nice(): return sorted({os.getpriority(os.PRIO_PROCESS, t.native_id) for t in threading.enumerate()})
gentle_start.lower(); seen.append(nice())
late = threading.Thread(target=stop.wait); late.start(); seen.append(nice())
gentle_start.restore(); seen.append(nice())
stop.set(); print(seen)
"""


@pytest.mark.skipif(not gentle_start.may_return(), reason="this process may not raise its priority again")
def test_all_threads_are_lowered_and_restored() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[[10], [10], [0]]", run.stderr


def test_without_permission_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(which: int, who: int, priority: int) -> None:
        asked.append(who)
        if len(asked) > 1:
            raise PermissionError

    before = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(os, "setpriority", refuse)
    assert not gentle_start.lower()
    # Only the thread that tried was touched.
    assert len(set(asked)) == 1 and threading.get_native_id() not in asked
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
