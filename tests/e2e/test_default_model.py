"""A server as it is started first: the default model knows what its dense parent knew, whoever has the key may ask, and
`down` leaves nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.programs import ServerProgram, free_port, refusal, run


@pytest.mark.slow
def test_the_capital_of_france_keys_status_and_down(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        # Eager, so that the test does not wait for the compiler.
        "engine": {"enforce_eager": True, "max_model_len": 512, "kv_cache": "256MiB"},
        "hosts": [{"name": "local", "count": 2}],
        "server": {"port": free_port(), "api_keys": ["env:TEST_API_KEY"]},
    }
    program = ServerProgram(tmp_path / "server", config, {"TEST_API_KEY": "correct-horse"})
    try:
        program.wait_ready()
        _check_keys(program.url)
        asked = ("--url", program.url, "--max-tokens", "24", "--api-key", "correct-horse")
        completed = run(tmp_path / "complete", "complete", "The capital of France is", *asked)
        assert completed.process.returncode == 0 and "Paris" in completed.out, completed.out + completed.err
        answered = run(tmp_path / "chat", "chat", "What is the capital of France?", *asked)
        assert answered.process.returncode == 0 and "Paris" in answered.out, answered.out + answered.err
        assert "API key" in refusal(run(tmp_path / "no-key", "complete", "a", "--url", program.url))
        _check_status(program, tmp_path)
        down = run(tmp_path / "down", "down", "--url", program.url)
        assert down.process.returncode == 0, down.err
        assert program.wait() == 0, program.err
        program.assert_gone(5.0)
        assert program.url in refusal(run(tmp_path / "again", "down", "--url", program.url))
        assert "correct-horse" not in program.out + program.err
    finally:
        program.kill()


def _check_keys(url: str) -> None:
    def models(headers: dict[str, str]) -> httpx.Response:
        return httpx.get(f"{url}/v1/models", headers=headers, timeout=60)

    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct-horse"}):
        refused = models(headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert models({"authorization": "Bearer correct-horse"}).status_code == 200
    for path in ("/health", "/ready"):
        assert httpx.get(url + path, timeout=60).status_code == 200
    for path in ("/metrics", "/expertmesh/stats", "/openapi.json", "/docs"):
        assert httpx.get(url + path, timeout=60).status_code == 401


def _check_status(program: ServerProgram, folder: Path) -> None:
    status = run(folder / "status", "status", "--json", "--url", program.url)
    assert status.process.returncode == 0, status.err
    state = json.loads(status.out)
    assert state["ready"] is True and state["model"] == "smollm2-8x135m" and state["url"] == program.url
    assert [host["host_id"] for host in state["hosts"]] == ["local-0", "local-1"]
    # Thirty layers of eight experts on two hosts, each expert once.
    assert [host["experts_loaded"] for host in state["hosts"]] == [120, 120]
    assert all(host["state"] == "ready" and host["pid"] for host in state["hosts"])
    table = run(folder / "table", "status", "--url", program.url)
    assert "local-1" in table.out and "ready" in table.out
    assert "engine" not in state and "EXPERTMESH_API_KEY" in table.out
    known = run(folder / "known", "status", "--json", "--url", program.url, "--api-key", "correct-horse")
    assert json.loads(known.out)["engine"]["dispatches"] > 0
