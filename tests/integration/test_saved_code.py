"""An engine's compiled code serves its next start, and heeds what is changed of the model while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.vllm_forks import VllmForks
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow


def test_loaded_code_computes_what_was_compiled(forks: VllmForks, tmp_path: Path) -> None:
    checkpoint = make_tiny("mixtral", tmp_path / "mixtral")
    runs = [start(forks, checkpoint, tmp_path / "cache") for _ in range(2)]
    assert [(run["saved"], run["loaded"]) for run in runs] == [(1, 0), (0, 1)]
    assert runs[0]["asked"] == runs[1]["asked"]
    asked = runs[1]["asked"]
    chosen = {state: {expert for row in of["experts"] for expert in row} for state, of in asked.items()}
    assert 0 in chosen["plain"] and 0 not in chosen["without the first"]
    assert 8 in chosen["with one more"] and 8 not in chosen["plain"]
    assert asked["plain"]["inputs"] > 0 == asked["other weights"]["inputs"]


def start(forks: VllmForks, checkpoint: Path, cache: Path) -> dict[str, Any]:
    done = forks.run("tests.integration.saved_code_worker", str(checkpoint), str(cache))
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(results[0].removeprefix("RESULT ")))
