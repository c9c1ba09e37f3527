"""Chosen experts of a tiny model learn: they alone, to the same losses after a break, and as they will serve."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.expert_slices import ChosenExperts
from actors.expert_training import Training, TrainSettings, rate
from actors.text_routing import choices, expert_modules
from actors.version_comparison import bits_of, compare
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.versions.publish import publish
from cluster.versions.store import Store
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

CHOSEN = ((0, 1), (1, 0), (1, 3))
SETTINGS = TrainSettings(steps=24, rate=3e-3, warm_steps=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tmp_path_factory.mktemp("tiny") / "model"))


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def rows(step: int) -> torch.Tensor:
    """Numbers that go up by one: something to be learnt."""
    return (torch.arange(12) + torch.arange(4)[:, None] * 7 + step * 3) % 50


def training(checkpoint: Checkpoint) -> tuple[Any, ChosenExperts, Training]:
    model = loaded(checkpoint.path)
    chosen = ChosenExperts(model, CHOSEN)
    return model, chosen, Training(model, chosen, SETTINGS)


def test_chosen_experts_learn_and_nothing_else_changes(checkpoint: Checkpoint) -> None:
    model, chosen, learner = training(checkpoint)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen = [learner.train(rows(step)) for step in range(SETTINGS.steps)]
    assert seen[0].divergence == pytest.approx(0.0, abs=1e-6) and seen[-1].divergence > 0
    assert seen[-1].cross_entropy < seen[0].cross_entropy - 0.05
    assert [one.step for one in seen] == list(range(1, SETTINGS.steps + 1))
    assert 0 < chosen.share < 0.2
    modules = expert_modules(model)
    for name, parameter in model.named_parameters():
        owner = next(
            (layer for layer, m in modules.items() if any(p is parameter for p in m.parameters())), None
        )
        for number in range(len(parameter)) if owner is not None else ():
            changed = not torch.equal(parameter[number], before[name][number])
            assert changed == ((owner, number) in CHOSEN), (name, number)
        if owner is None:
            assert torch.equal(parameter, before[name]) and not parameter.requires_grad, name
    with chosen.as_before():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert learner.train(rows(0)).divergence > 0, "it is as trained again"


def test_the_pull_towards_the_version_before_is_felt(checkpoint: Checkpoint) -> None:
    ends = []
    for beta in (1e-6, 300.0):
        model = loaded(checkpoint.path)
        settings = TrainSettings(steps=30, rate=3e-3, warm_steps=2, beta=beta)
        learner = Training(model, ChosenExperts(model, CHOSEN), settings)
        ends.append([learner.train(rows(step)) for step in range(30)][-1].divergence)
    assert ends[1] < ends[0] / 2


def test_what_was_broken_off_goes_on_to_the_same_losses(checkpoint: Checkpoint) -> None:
    _, _, whole = training(checkpoint)
    losses = [whole.train(rows(step)).loss for step in range(16)]
    _, _, first = training(checkpoint)
    found = [first.train(rows(step)).loss for step in range(7)]
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    _, _, second = training(checkpoint)
    second.load(torch.load(file, weights_only=True))
    assert second.step == 7
    found += [second.train(rows(step)).loss for step in range(7, 16)]
    assert found == losses
    with pytest.raises(LearningError, match="of other experts"):
        ChosenExperts(loaded(checkpoint.path), [(0, 0)]).load(first.state()["masters"])


def test_what_was_trained_is_what_a_version_of_it_computes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, chosen, learner = training(checkpoint)
    for step in range(4):
        learner.train(rows(step))
    file = tmp_path / "trained.safetensors"
    save_file(chosen.tensors(checkpoint), file)
    made = publish(Store(str(tmp_path / "store")), checkpoint, file)
    assert made.changed == {0: (1,), 1: (0, 3)} and made.new_blobs == 3
    copy = shutil.copytree(checkpoint.path, tmp_path / "copy")
    held = load_file(copy / "model.safetensors")
    save_file({**held, **load_file(file)}, copy / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        trained, served = (m(input_ids=rows(9)).logits for m in (model, loaded(copy)))
    torch.testing.assert_close(trained, served, atol=1e-4, rtol=0)


def test_what_can_not_be_trained_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = loaded(checkpoint.path)
    for chosen, words in (
        ([(0, 99)], "no expert 99 in layer 0"),
        ([(7, 0)], "no expert 0 in layer 7"),
        ([], "no expert is chosen"),
    ):
        with pytest.raises(LearningError, match=words):
            ChosenExperts(model, chosen)
    learner = Training(model, ChosenExperts(model, CHOSEN), SETTINGS)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(LearningError, match="step 1: the loss is nan"):
        learner.train(rows(0))
    assert learner.step == 0


def test_rates_rise_and_fall() -> None:
    rates = [rate(SETTINGS, step) for step in range(SETTINGS.steps + 1)]
    assert rates[0] == pytest.approx(SETTINGS.rate / 4) and max(rates) == rates[3] == SETTINGS.rate
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(SETTINGS.rate / 10)


def test_versions_are_compared_in_one_reading(checkpoint: Checkpoint) -> None:
    model, chosen, learner = training(checkpoint)
    texts = [rows(0)[0].tolist(), rows(5)[1].tolist()]
    assert compare(model, chosen.as_before, texts).divergence == pytest.approx(0.0, abs=1e-6)
    for step in range(3):
        learner.train(rows(step))
    told: list[int] = []
    found = compare(model, chosen.as_before, texts, lambda: told.append(1))
    assert found.divergence > 1e-6 and len(told) == 2
    assert found.after == choices(model, texts)
    assert [after for _, after in found.bits] == pytest.approx([bits_of(model, text) for text in texts])
    with chosen.as_before():
        assert found.before == choices(model, texts)
        assert [bits for bits, _ in found.bits] == pytest.approx([bits_of(model, text) for text in texts])
    # KL divergence, as it is written in books.
    one, other = (torch.log_softmax(model(torch.tensor([texts[0]])).logits[0], -1) for _ in (0, 1))
    with chosen.as_before():
        one = torch.log_softmax(model(torch.tensor([texts[0]])).logits[0], -1)
    nats = (one.exp() * (one - other)).sum(-1).mean().item()
    assert compare(model, chosen.as_before, texts[:1]).divergence == pytest.approx(nats, rel=1e-3)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    even = torch.tensor(float(model.config.vocab_size)).log2().item()
    assert bits_of(model, list(range(11))) == pytest.approx(10 * even, rel=1e-4)
    assert compare(model, chosen.as_before, []).divergence == 0.0
