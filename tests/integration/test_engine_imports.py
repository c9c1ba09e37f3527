"""What an engine's process has imported when vLLM starts in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_the_engine_imports_before_it_starts_has_no_numba() -> None:
    """vLLM 0.32 looks through all that is imported when it starts, and stumbles over Numba's bindings."""
    run = subprocess.run(
        [sys.executable, "-c", "import sys, actors.dispatch, cluster.traffic; print('numba' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.strip() == "False", run.stderr
