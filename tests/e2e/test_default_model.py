"""The default model knows what its dense parent knew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.programs import ServerProgram, free_port, run


@pytest.mark.slow
def test_the_capital_of_france(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        # Eager, so that the test does not wait for the compiler.
        "engine": {"enforce_eager": True, "max_model_len": 512, "kv_cache": "256MiB"},
        "hosts": [{"name": "local", "count": 2}],
        "server": {"port": free_port()},
    }
    program = ServerProgram(tmp_path / "server", config)
    try:
        program.wait_ready()
        asked = ("--url", program.url, "--max-tokens", "24")
        completed = run(tmp_path / "complete", "complete", "The capital of France is", *asked)
        assert completed.process.returncode == 0 and "Paris" in completed.out, completed.out + completed.err
        answered = run(tmp_path / "chat", "chat", "What is the capital of France?", *asked)
        assert answered.process.returncode == 0 and "Paris" in answered.out, answered.out + answered.err
        program.interrupt()
        assert program.wait() == 0, program.err
        program.assert_gone()
    finally:
        program.kill()
