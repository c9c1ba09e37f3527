"""What can't work ends in one clear message on standard error, a non-zero exit code, and nothing left running."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.programs import free_port, refusal, run, settings
from tests.tiny_dense import make_tiny_dense
from tests.tiny_models import make_tiny
from workloads.models.upcycle import upcycle


def _refused(folder: Path, config: dict[str, Any] | str, *arguments: str, command: str = "serve") -> str:
    """Run the command with this configuration; returns its message."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mesh.yaml"
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return refusal(run(folder, command, "--config", str(file), *arguments))


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
        message = refusal(run(tmp_path / command[0], *command, environment=environment))
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
