"""Which experts a domain is about: counted with the model itself, through the command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.text_routing import choices
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.learning.records import Record
from cluster.learning.stream import Stream
from tests.tiny_dense import make_tiny_dense
from tests.tiny_models import make_tiny
from workloads import cli
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "granitemoe"])
def test_every_choice_of_every_router_is_counted(arch: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny(arch, tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    counts = choices(model, [[1, 2, 3], [4, 5], []])
    assert list(counts) == [layer.index for layer in checkpoint.moe_layers]
    for layer in checkpoint.moe_layers:
        assert len(counts[layer.index]) == layer.num_experts
        assert sum(counts[layer.index]) == 5 * checkpoint.top_k
    assert choices(model, [[1, 2, 3]]) != counts, "hooks of before are gone"
    with pytest.raises(LearningError, match="Linear has no layers of experts"):
        choices(torch.nn.Linear(1, 1), [])


def test_the_command_says_which_experts_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in os.environ:
        if name.startswith("EXPERTMESH"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    dense = make_tiny_dense(tmp_path / "dense")
    upcycle(dense, tmp_path / "model", dtype="float32")
    stream = Stream(str(tmp_path / "stream"))
    for domain, word in (("law", "winter"), ("code", "river"), ("empty", "x")):
        texts = [f"{word} {number} {word}s early and {number + 1} late {word}" for number in range(60)]
        stream.append(
            [Record("text", f"{domain}{n}", 1.0, domain=domain, answer=text) for n, text in enumerate(texts)]
        )
    (tmp_path / "expertmesh.yaml").write_text("model: {path: model}\nlearning: {stream: stream}\n")

    def run(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["expertmesh", "learn", "experts", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return said.err if code else said.out

    found = json.loads(
        run("--domain", "law", "--against", "code", "--tokens", "300", "--json", "--png", "map.png")
    )
    assert found["against"] == ["code"] and found["tokens"] == [300, 300] and found["chosen"]
    for layer, counts in found["counts"].items():
        assert sum(counts) == 600 and len(counts) == 8 and layer in found["background"]
    for one in found["chosen"]:
        assert one["gain"] == pytest.approx(one["share"] - one["background"]) and one["gain"] > 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    shown = run("--domain", "law", "--tokens", "300", "--reach", "1")
    assert "to be cloned" in shown and "tokens of law" in " ".join(shown.split())
    assert "no domain 'physics'" in run("--domain", "physics", code=1)
    assert "compared with itself" in " ".join(run("--domain", "law", "--against", "law", code=1).split())
