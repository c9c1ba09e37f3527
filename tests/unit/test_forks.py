"""Tests that run in forks are told as if there were none, and one whose process dies has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import os
import warnings
import pytest

warnings.warn("at the import")

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")

@pytest.mark.parametrize("number", range(30))
def test_passes(number, shared, tmp_path):
    assert shared.exists() and tmp_path.exists()

def test_fails():
    print("what was printed")
    warnings.warn("what was warned of")
    assert os.getpid() == 1, "what went wrong"

@pytest.mark.skip(reason="no need")
def test_skipped():
    pass
"""
DIES = """
import os, signal

def test_dies():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_outcomes_output_and_a_death(tmp_path: Path) -> None:
    # The one that dies is in the last file: what a dying process has taken on besides is lost.
    (tmp_path / "test_first.py").write_text(TESTS)
    (tmp_path / "test_last.py").write_text(DIES)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.forks", "--forks", "2"),
            *("-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "2 failed, 30 passed, 1 skipped, 2 warnings" in done.stdout
    for said in ("what was printed", "what went wrong", "what was warned of"):
        assert said in done.stdout
    assert "test_last.py::test_dies" in done.stdout and "the process died that ran it" in done.stdout
