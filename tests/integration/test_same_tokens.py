"""Greedy float32 tokens of the mesh equal stock vLLM's, whatever the architecture and the number of hosts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.vllm_forks import VllmForks
from tests.tiny_models import make_tiny
from workloads.models.default_model import default_model

SUPPORTED = [
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
]
PROMPTS, TOKENS, HOSTS = 16, 32, (1, 2, 3)


def run_worker(forks: VllmForks, checkpoint: Path, dtype: str) -> subprocess.CompletedProcess[str]:
    """The comparison in a process of its own: vLLM holds one model per process."""
    numbers = map(str, (PROMPTS, TOKENS, *HOSTS))
    return forks.run("tests.integration.same_tokens_worker", str(checkpoint), dtype, *numbers)


def compare(forks: VllmForks, checkpoint: Path, dtype: str = "float32") -> dict[str, Any]:
    done = run_worker(forks, checkpoint, dtype)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(results[0].removeprefix("RESULT "))


@pytest.mark.slow
@pytest.mark.parametrize("arch", SUPPORTED)
def test_tokens_equal_stock_vllm(forks: VllmForks, arch: str, tmp_path: Path) -> None:
    result = compare(forks, make_tiny(arch, tmp_path / arch))
    stock = result["stock"]
    # A model that says one token over and over would make any comparison pass.
    assert len({token for answer in stock for token in answer}) > 50
    for hosts in HOSTS:
        assert result["mesh"][str(hosts)] == stock, f"{hosts} hosts"
    assert result["expert_parameters_in_engine"] == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1300)
def test_the_default_model_s_tokens_equal_stock_vllm_s(forks: VllmForks) -> None:
    result = compare(forks, default_model())
    for hosts in HOSTS:
        assert result["mesh"][str(hosts)] == result["stock"], f"{hosts} hosts"


@pytest.mark.slow
def test_an_architecture_with_expert_layers_of_its_own_is_refused(forks: VllmForks, tmp_path: Path) -> None:
    """gpt-oss's experts stay in the engine, where they would be empty: that must never pass silently."""
    done = run_worker(forks, make_tiny("gpt_oss", tmp_path / "gpt_oss"), "float32")
    assert done.returncode != 0
    assert "brings its own expert layer, GptOssRoutedExperts" in done.stdout + done.stderr
