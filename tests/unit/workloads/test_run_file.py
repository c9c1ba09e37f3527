"""Run files: who runs here, and what a crash may leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster.errors import ExpertmeshError
from workloads import run_file
from workloads.run_file import Run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "expertmesh" / "run"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Another living process of this user."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def run_of(pid: int, url: str = "http://127.0.0.1:8000") -> Run:
    return Run(pid, psutil.Process(pid).create_time(), url, "m", "127.0.0.1:6379", "expertmesh", "/t")


def test_what_was_written_is_found(folder: Path) -> None:
    assert run_file.running() == []
    run = run_of(os.getpid())
    path = run_file.write(run)
    assert path.parent == folder
    assert folder.stat().st_mode & 0o077 == 0
    assert run_file.running() == [run]
    assert run_file.the_one() == run_file.the_one("http://127.0.0.1:8000/") == run
    path.unlink()
    with pytest.raises(ExpertmeshError, match="no expertmesh server"):
        run_file.the_one()


def test_a_file_of_a_dead_process_is_removed(process: subprocess.Popen[bytes]) -> None:
    path = run_file.write(run_of(process.pid))
    assert len(run_file.running()) == 1
    process.kill()
    # Not waited for: the process is a zombie, which still has its pid and its time of birth.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert run_file.running() == []
    assert not path.exists()


def test_a_reused_pid_is_not_taken_for_the_server() -> None:
    run = run_of(os.getpid())
    path = run_file.write(replace(run, started=run.started - 3600))
    assert run_file.running() == []
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"pid": 1}', json.dumps({"surprise": 1}), "\x00\x00"],
)
def test_a_torn_file_is_removed_and_the_others_count(folder: Path, text: str) -> None:
    run = run_of(os.getpid())
    run_file.write(run)
    torn = folder / "1.json"
    torn.write_text(text)
    assert run_file.running() == [run]
    assert not torn.exists()


def test_of_several_servers_one_must_be_named(process: subprocess.Popen[bytes]) -> None:
    mine, other = run_of(os.getpid()), run_of(process.pid, "http://127.0.0.1:8001")
    run_file.write(other)
    run_file.write(mine)
    assert run_file.running() == sorted([mine, other], key=lambda run: run.started)
    with pytest.raises(ExpertmeshError, match="several servers run") as error:
        run_file.the_one()
    assert "http://127.0.0.1:8001" in error.value.message and "--url" in error.value.hint
    assert run_file.the_one("http://127.0.0.1:8001") == other
    with pytest.raises(ExpertmeshError, match=r"at http://127\.0\.0\.1:8002"):
        run_file.the_one("http://127.0.0.1:8002")
