"""One tiny model and one server for the whole session; a real tokenizer, random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.programs import Program, ServerProgram, free_port, settings
from tests.tiny_dense import make_tiny_dense
from workloads.models.upcycle import upcycle


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral's layout with two heads of 32, the smallest that vLLM's attention on CPUs has."""
    folder = tmp_path_factory.mktemp("tiny")
    dense = make_tiny_dense(
        folder / "dense", num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024
    )
    return upcycle(dense, folder / "tiny", dtype="float32")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    """A running server; at the end Ctrl-C must end it and leave nothing."""
    folder = tmp_path_factory.mktemp("server")
    capture = {"without_key": True, "consent": "a test", "shard_age": "1s"}
    learning = {"stream": str(folder / "stream"), "capture": capture}
    program = ServerProgram(folder, settings(tiny_model, free_port(), learning=learning))
    try:
        program.wait_ready()
        yield program
        program.interrupt()
        assert program.wait() == 0, program.err
        assert "Traceback" not in program.err
        program.assert_gone()
    finally:
        program.kill()


@pytest.fixture(scope="session")
def leaving() -> Iterator[list[Program]]:
    """Programs whose last processes take a minute to go: all must be gone when the session ends."""
    programs: list[Program] = []
    yield programs
    try:
        for program in programs:
            program.assert_gone(90.0)
    finally:
        for program in programs:
            program.kill()


@pytest.fixture
def client(server: ServerProgram) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
