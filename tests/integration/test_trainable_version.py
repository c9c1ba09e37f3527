"""A version is trained with the weights that it serves with: the same logits as of its checkpoint, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.trainable_version import open_version, router_modules
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.versions.growth import ExpertId
from cluster.versions.publish import publish
from cluster.versions.store import Store
from tests.changed_model import changed_model
from tests.grown_model import grown_model
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

TOKENS = torch.arange(24).reshape(2, 12) % 50


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=TOKENS).logits
        return found


def plain(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tmp_path / "base"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("arch", ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "granitemoe"])
def test_changed_experts_and_dense_tensors_are_those_of_the_version(
    arch: str, tmp_path: Path, store: Store
) -> None:
    checkpoint = Checkpoint.open(make_tiny(arch, tmp_path / "base"))
    layers = list(checkpoint.layouts)
    if any(layout.fused for layout in checkpoint.layouts.values()):
        pytest.skip("tests.changed_model writes experts that are tensors of their own")
    gates = [name for name in checkpoint.tensors if name.endswith("gate.weight")]
    folder, file = changed_model(checkpoint.path, tmp_path / "changed", [(layers[-1], 1)], gates)
    made = publish(store, checkpoint, file)
    model = open_version(checkpoint, store, made.digest)
    assert torch.equal(logits(model), plain(folder))
    assert not torch.equal(logits(open_version(checkpoint)), plain(folder))


def test_added_experts_are_there(checkpoint: Checkpoint, tmp_path: Path, store: Store) -> None:
    folder, file = grown_model(checkpoint.path, tmp_path / "grown", 2)
    made = publish(store, checkpoint, file)
    model = open_version(checkpoint, store, made.digest)
    torch.testing.assert_close(logits(model), plain(folder), atol=1e-5, rtol=0)
    assert {len(router.weight) for router in router_modules(model).values()} == {10}
    cloned = publish(store, checkpoint, None, clones=[ExpertId(0, 1)], parent=made.digest)
    model = open_version(checkpoint, store, cloned.digest)
    rows = router_modules(model)[0].weight
    assert len(rows) == 11 and torch.equal(rows[1], rows[10])


def test_what_can_not_be_opened_is_refused(checkpoint: Checkpoint, tmp_path: Path, store: Store) -> None:
    other = Checkpoint.open(make_tiny("mixtral", tmp_path / "other", num_hidden_layers=3))
    _, file = changed_model(checkpoint.path, tmp_path / "changed", [(0, 1)])
    made = publish(store, checkpoint, file)
    with pytest.raises(LearningError, match="is of another model than"):
        open_version(other, store, made.digest)
    less = publish(store, checkpoint, None, retired=[ExpertId(0, 1)])
    with pytest.raises(LearningError, match="experts that were retired"):
        open_version(checkpoint, store, less.digest)
