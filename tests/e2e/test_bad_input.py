"""What can't work ends in one clear message on standard error, a non-zero exit code, and nothing left running."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.programs import Program, ServerProgram, free_port, run, settings
from tests.tiny_dense import make_tiny_dense
from tests.tiny_models import make_tiny
from workloads import run_file
from workloads.models.upcycle import upcycle


def _refused(folder: Path, config: dict[str, Any] | str, *arguments: str, command: str = "serve") -> str:
    """Run the command with this configuration; returns its message."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mesh.yaml"
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return _message(run(folder, command, "--config", str(file), *arguments))


def _message(program: Program) -> str:
    assert program.process.returncode == 1, program.err
    assert "Traceback" not in program.err + program.out
    assert program.err.count("error:") == 1, program.err
    assert program.process.pid not in [found.pid for found in run_file.running()]
    # Rich wraps nothing here, but a message may stand in several lines.
    return " ".join(program.err.split())


def test_missing_folder(tmp_path: Path) -> None:
    message = _refused(tmp_path, settings(tmp_path / "nowhere", free_port()))
    assert "nowhere" in message and "config.json" in message


def test_torn_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(tiny_model, tmp_path / "torn"))
    file = next(torn.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert file.name in _refused(tmp_path, settings(torn, free_port()))


def test_missing_shard(tiny_model: Path, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(tiny_model, tmp_path / "torn"))
    file = next(torn.glob("*.safetensors"))
    file.unlink()
    assert file.name in _refused(tmp_path, settings(torn, free_port()))


def test_not_a_mixture_of_experts(tmp_path: Path) -> None:
    dense = make_tiny_dense(tmp_path / "dense")
    assert "expert" in _refused(tmp_path, settings(dense, free_port()))


def test_unsupported_architecture_is_refused_at_once(tmp_path: Path) -> None:
    model = make_tiny("gpt_oss", tmp_path / "model")
    message = _refused(tmp_path, settings(model, free_port()))
    assert "gpt_oss" in message and "not supported" in message
    assert "starting Ray" not in message


def test_broken_yaml(tmp_path: Path) -> None:
    assert "mesh.yaml" in _refused(tmp_path, "model: [")


def test_unknown_key_and_wrong_value(tiny_model: Path, tmp_path: Path) -> None:
    config = settings(tiny_model, free_port(), engine={"max_num_seq": 3, "max_num_seqs": "many"})
    message = _refused(tmp_path, config)
    # Both at once, each with its place.
    assert "max_num_seq" in message and "many" in message and "mesh.yaml" in message


def test_too_little_memory(tiny_model: Path, tmp_path: Path) -> None:
    hosts = [{"name": "small", "count": 2, "memory": "64KiB"}]
    message = _refused(tmp_path, settings(tiny_model, free_port(), hosts=hosts), command="plan")
    assert "small" in message and "memory" in message.lower()
    assert any(unit in message for unit in ("KiB", "MiB", "GiB")), message


def test_no_node_for_a_selector(tiny_model: Path, tmp_path: Path) -> None:
    hosts = [{"name": "far", "selector": {"zone": "b"}}]
    message = _refused(tmp_path, settings(tiny_model, free_port(), hosts=hosts))
    assert "zone: b" in message and "far" in message


def test_port_in_use(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = _refused(tmp_path, settings(tiny_model, port))
    assert str(port) in message and "starting Ray" not in message


def test_open_to_the_network_without_a_key(tiny_model: Path, tmp_path: Path) -> None:
    message = _refused(tmp_path, settings(tiny_model, free_port(), server={"host": "0.0.0.0"}))
    assert "API key" in message and "server.host" in message


def test_no_cluster_at_the_address(tiny_model: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    message = _refused(tmp_path, settings(tiny_model, free_port()), "--address", address)
    assert address in message and "ray start" in message


def test_token_file_open_to_others(tiny_model: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    message = _refused(tmp_path, settings(tiny_model, free_port(), ray={"token_path": str(token)}))
    assert f"chmod 600 {token}" in message and "0" * 64 not in message


def test_nothing_runs_to_be_ended_or_asked(tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(tmp_path)}
    for command in (["down"], ["status"], ["chat", "hello"], ["complete", "hello"]):
        message = _message(run(tmp_path / command[0], *command, environment=environment))
        assert "expertmesh serve" in message


@pytest.mark.slow
def test_host_that_cannot_load(tmp_path: Path) -> None:
    # vLLM's kernel works in blocks of 32 columns, and 48 are none.
    dense = make_tiny_dense(tmp_path / "dense", hidden_size=48, num_attention_heads=2, num_key_value_heads=1)
    model = upcycle(dense, tmp_path / "model", dtype="float32")
    hosts = [{"name": "local", "threads": 1}, {"name": "fixed", "threads": 1, "kernel": "vllm-cpu"}]
    message = _refused(tmp_path, settings(model, free_port(), hosts=hosts))
    assert "fixed-0" in message and "vllm-cpu" in message


@pytest.mark.slow
def test_engine_that_cannot_start(tmp_path: Path) -> None:
    # vLLM's attention on CPUs has no heads of 16: it loads and fails at the first token.
    dense = make_tiny_dense(tmp_path / "dense")
    model = upcycle(dense, tmp_path / "model", dtype="float32")
    config = settings(model, free_port(), engine={"max_model_len": 256})
    message = _refused(tmp_path, config)
    assert "the engine could not start" in message and "head_dim=16" in message


@pytest.mark.slow
def test_api_keys_status_and_down(tiny_model: Path, tmp_path: Path) -> None:
    """One server with a key: who may come in, what `status` tells, and that `down` leaves nothing."""
    config = settings(tiny_model, free_port(), server={"api_keys": ["env:TEST_API_KEY"]})
    program = ServerProgram(tmp_path / "server", config, {"TEST_API_KEY": "correct-horse"})
    try:
        program.wait_ready()
        _check_keys(program.url)
        _check_status(program, tmp_path)
        answer = run(tmp_path / "ask", "complete", "a", "--url", program.url, "--api-key", "correct-horse")
        assert answer.process.returncode == 0, answer.err
        assert "API key" in _message(run(tmp_path / "no-key", "complete", "a", "--url", program.url))
        down = run(tmp_path / "down", "down", "--url", program.url)
        assert down.process.returncode == 0, down.err
        assert program.wait() == 0
        program.assert_gone(5.0)
        assert program.url in _message(run(tmp_path / "again", "down", "--url", program.url))
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
    assert state["ready"] is True and state["model"] == "tiny" and state["url"] == program.url
    assert [host["host_id"] for host in state["hosts"]] == ["local-0", "local-1"]
    # Two layers of eight experts on two hosts, each expert once.
    assert [host["experts_loaded"] for host in state["hosts"]] == [8, 8]
    assert all(host["state"] == "ready" and host["pid"] for host in state["hosts"])
    table = run(folder / "table", "status", "--url", program.url)
    assert "local-1" in table.out and "ready" in table.out
    assert "engine" not in state and "EXPERTMESH_API_KEY" in table.out
    known = run(folder / "known", "status", "--json", "--url", program.url, "--api-key", "correct-horse")
    assert json.loads(known.out)["engine"]["dispatches"] > 0
