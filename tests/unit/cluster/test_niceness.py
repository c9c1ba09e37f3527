"""Priority: what a process may take back is tried, and every thread gets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster import niceness

PROGRAM = """
import os, threading
from cluster import niceness
stop = threading.Event()
os.setpriority(os.PRIO_PROCESS, 0, 15)
other = threading.Thread(target=stop.wait); other.start()
def numbers(): return sorted({os.getpriority(os.PRIO_PROCESS, t.native_id) for t in threading.enumerate()})
seen = [numbers()]
niceness.usual(); seen.append(numbers())
stop.set(); print(seen)
"""


@pytest.mark.skipif(not niceness.may_return(), reason="this process may not lower its niceness")
def test_every_thread_gets_the_usual_priority() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[[15], [0]]", run.stderr
    assert niceness.of_workers() == "15"


def test_without_permission_workers_start_as_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(niceness, "may_return", lambda: False)
    assert niceness.of_workers() == "0"
