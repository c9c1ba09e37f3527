"""Deaths and endings: of a frozen host, of one that is killed under load, of the server's own process, and during
start-up.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.programs import Program, ServerProgram, free_port, run, settings, wait_for

pytestmark = pytest.mark.slow
RAY_S_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")

PROMPT = "The river froze early that winter"
TOKENS = 300
FEW = 40


def test_a_host_freezes_another_dies_then_the_server(
    tiny_model: Path, tmp_path: Path, leaving: list[Program]
) -> None:
    """A host that is stopped, and kill -9 of the other in the middle of a stream: the same tokens; then of the
    server: nothing stays.
    """
    config = settings(tiny_model, free_port(), placement={"replicas": 2})
    program = ServerProgram(tmp_path / "server", config)
    try:
        program.wait_ready()
        expected = _stream(program.url)
        before = _hosts(program, tmp_path / "before")
        frozen, victim = before["local-0"]["pid"], before["local-1"]["pid"]

        os.kill(frozen, signal.SIGSTOP)
        try:
            assert _stream(program.url, count=FEW) == expected[:FEW]
            assert _stats(program)["hedges"] > 0
        finally:
            os.kill(frozen, signal.SIGCONT)

        started, tokens = threading.Event(), []
        reader = threading.Thread(target=lambda: tokens.extend(_stream(program.url, started)))
        reader.start()
        assert started.wait(60)
        # On busy cores a host may be out for being late: the death of one that is not asked is nobody's loss.
        wait_for(lambda: not _stats(program)["ejected"], 30, "both hosts to be in use")
        os.kill(victim, signal.SIGKILL)
        reader.join(250)
        assert not reader.is_alive()
        assert tokens == expected
        after = wait_for(lambda: _hosts(program, tmp_path / "after"), 60, "both hosts to be ready")
        assert after["local-1"]["pid"] != victim and after["local-0"]["pid"] == frozen
        stats = _stats(program)
        assert stats["lost"] >= 1
        # A killed process frees its memory before it closes its sockets: it may be found late before it is lost.
        assert stats["failovers"] + stats["hedges"] >= 1
        assert httpx.get(f"{program.url}/ready", timeout=60).status_code == 200

        os.kill(program.process.pid, signal.SIGKILL)
        program.process.wait(30)
        wait_for(lambda: not _ours(program), 30, "all that is ours to end")
        again = run(tmp_path / "status", "status", "--url", program.url)
        assert again.process.returncode == 1 and "expertmesh serve" in again.err
    except BaseException:
        program.kill()
        raise
    # Ray's agents tell its control plane of the raylet's end before they go, for a minute, although it is gone too.
    leaving.append(program)


@pytest.mark.parametrize("stage", ["starting Ray", "starting the engine"])
def test_interrupted_while_it_starts(tiny_model: Path, tmp_path: Path, stage: str) -> None:
    program = ServerProgram(tmp_path, settings(tiny_model, free_port()))
    try:
        program.wait_for_text(stage)
        program.interrupt()
        assert program.wait() == 130, program.err
        assert "Traceback" not in program.err
        program.assert_gone()
    finally:
        program.kill()


def _stream(url: str, started: threading.Event | None = None, count: int = TOKENS) -> list[int]:
    """Greedy token ids; `started` is set once a few have come."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=250)
    tokens: list[int] = []
    extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    for chunk in client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=count, temperature=0.0, stream=True, extra_body=extra
    ):
        tokens.extend(chunk.choices[0].token_ids or [])  # type: ignore[attr-defined]
        if started is not None and len(tokens) >= 5:
            started.set()
    return tokens


def _stats(program: ServerProgram) -> dict[str, Any]:
    """The engine's counters."""
    stats: dict[str, Any] = httpx.get(f"{program.url}/expertmesh/stats", timeout=60).json()
    return stats


def _hosts(program: ServerProgram, folder: Path) -> dict[str, Any]:
    """By id what `status` says of the hosts; empty unless all are ready."""
    status = run(folder, "status", "--json", "--url", program.url)
    hosts = {host["host_id"]: host for host in json.loads(status.out)["hosts"]}
    ready = all(host["state"] == "ready" and psutil.pid_exists(host["pid"]) for host in hosts.values())
    return hosts if ready else {}


def _ours(program: ServerProgram) -> list[str]:
    """Names of the program's living processes without Ray's agents."""
    names = []
    for process in program.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(process.name())
    return [name for name in names if name not in RAY_S_AGENTS]
