"""Workers that have some of each layer's experts, and a part of all else: together they are one process with it all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors.expert_parallel import divide_experts, owners
from actors.expert_slices import ChosenExperts
from actors.expert_training import Training, TrainSettings, merged
from actors.sharded_dense import shard_dense
from actors.text_routing import choices, expert_modules
from actors.training_rows import part_of
from cluster.errors import LearningError
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

CHOSEN = ((0, 1), (1, 0), (1, 3))
STEPS, ROWS = 4, 5
SETTINGS = TrainSettings(STEPS, 0.01, 2)


@given(
    st.dictionaries(st.integers(0, 5), st.integers(2, 9), min_size=1),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_every_expert_has_one_owner_and_the_trained_are_dealt_out_evenly(
    sizes: dict[int, int], workers: int, dice: Any
) -> None:
    every = [(layer, expert) for layer, size in sizes.items() for expert in range(size)]
    chosen = dice.sample(every, dice.randint(0, len(every)))
    found = owners(sizes, chosen, workers)
    assert {layer: len(of_experts) for layer, of_experts in found.items()} == sizes
    trained = Counter(found[layer][expert] for layer, expert in chosen)
    assert max(trained.values(), default=0) - min(trained[rank] for rank in range(workers)) <= 1
    assert all(0 <= worker < workers for of_experts in found.values() for worker in of_experts)


def _steps(rank: int, workers: int, path: Path, states: Path, *, shard: bool = False) -> None:
    """A worker, or the whole in one process; puts down its state and what all steps saw."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    places = None
    if workers > 1:
        meeting = f"file://{states}.meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
        sizes = {layer: int(module.num_experts) for layer, module in expert_modules(model).items()}
        places = divide_experts(model, owners(sizes, CHOSEN, workers), rank)
        if shard:
            shard_dense(model)

    def total(tensors: Any) -> None:
        for tensor in tensors if workers > 1 else ():
            dist.all_reduce(tensor)

    chosen = ChosenExperts(model, CHOSEN, places)
    learner = Training(model, chosen, SETTINGS, total=total, apart=workers > 1)
    model.train()
    seen = []
    for step in range(STEPS):
        rows = (torch.arange(12) + torch.arange(ROWS)[:, None] * 7 + step * 3) % 50
        mine = part_of(ROWS, rank, workers)
        trained = learner.train(rows[mine.start : mine.stop], len(mine) / ROWS)
        seen.append((trained.loss, trained.norm, trained.divergence))
    # Each worker counts what its own tokens chose, of all experts.
    counts = choices(model, [rows[0].tolist()])
    torch.save({"training": learner.state(), "seen": seen, "counts": counts}, f"{states}.{rank}")
    if workers > 1:
        dist.destroy_process_group()


def _worker(rank: int, path: Path, states: Path) -> None:
    _steps(rank, 2, path, states, shard=True)


def test_two_workers_that_divide_everything_are_one(tmp_path: Path) -> None:
    path = make_tiny("mixtral", tmp_path / "model")
    _steps(0, 1, path, tmp_path / "whole")
    mp.spawn(_worker, (path, tmp_path / "part"), nprocs=2)
    whole, *parts = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.0", "part.0", "part.1")
    )
    for part in parts:
        assert torch.tensor(part["seen"]) == pytest.approx(torch.tensor(whole["seen"]), abs=1e-5)
        assert part["counts"] == whole["counts"]
    assert not parts[0]["training"]["masters"].keys() & parts[1]["training"]["masters"].keys()
    state = merged([part["training"] for part in parts])
    assert state["masters"].keys() == whole["training"]["masters"].keys()
    for name, master in whole["training"]["masters"].items():
        torch.testing.assert_close(state["masters"][name], master, atol=1e-4, rtol=0)
    # What they came to goes on in one process, and a part of it in none.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    learner = Training(model, ChosenExperts(model, CHOSEN), SETTINGS)
    learner.load(state)
    assert learner.step == STEPS
    with pytest.raises(LearningError, match="of other experts"):
        learner.load(parts[0]["training"])
