"""A version's whole way over the admin API of a server that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.checkpoint import Checkpoint
from cluster.live_versions import HEADER
from tests.changed_model import changed_model
from tests.e2e.programs import ServerProgram, free_port, settings, wait_for

pytestmark = pytest.mark.slow


def test_a_version_is_uploaded_staged_promoted_and_rolled_back(tiny_model: Path, tmp_path: Path) -> None:
    layers = Checkpoint.open(tiny_model).moe_layers
    every = [(layer.index, expert) for layer in layers for expert in range(layer.num_experts)]
    _, file = changed_model(tiny_model, tmp_path, every)
    config = settings(
        tiny_model,
        free_port(),
        versions={"store": str(tmp_path / "store")},
        admin={"port": free_port(), "keys": ["env:ADMIN_KEY"]},
    )
    server = ServerProgram(tmp_path / "server", config, {"ADMIN_KEY": "hush"})
    admin_url = f"http://127.0.0.1:{config['admin']['port']}"
    try:
        server.wait_ready()
        server.wait_for_text(f"administered at {admin_url}/docs")
        with httpx.Client(timeout=60) as client:

            def answered() -> tuple[str, str]:
                body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
                answer = client.post(f"{server.url}/v1/completions", json=body).raise_for_status()
                return answer.headers[HEADER], answer.json()["choices"][0]["text"]

            def ask(method: str, path: str, content: bytes | None = None) -> dict[str, Any]:
                headers = {"Authorization": "Bearer hush"}
                answer = client.request(method, admin_url + path, headers=headers, content=content)
                return answer.raise_for_status().json()

            assert client.get(f"{admin_url}/live").status_code == 401
            base = ask("GET", "/live")["serving"]
            before = answered()
            assert before[0] == base
            made = ask("POST", "/versions?reason=better", content=file.read_bytes())
            version = made["digest"]
            assert sum(map(len, made["changed"].values())) == made["new_blobs"] == len(every)
            assert sum(ask("POST", f"/versions/{version}/stage")["bytes_by_host"].values()) > 0
            wait_for(lambda: version in ask("GET", "/live")["live"], 60.0, "the version")
            assert ask("POST", f"/versions/{version}/promote")["everywhere"] is True
            after = answered()
            assert after[0] == version and after[1] != before[1]
            assert ask("POST", "/rollback")["manifest"] == base
            assert answered() == before
        assert "hush" not in server.out + server.err
        server.interrupt()
        assert server.wait() == 0, server.err
        assert "Traceback" not in server.err
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{admin_url}/health")
        server.assert_gone()
    finally:
        server.kill()
