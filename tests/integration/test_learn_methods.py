"""Every way to learn a stream of domains, on a tiny model: what it may change, and that it learns at all."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from actors.bias_balance import BiasBalance
from actors.expert_slices import ChosenExperts
from actors.expert_training import Training, TrainSettings
from actors.router_review import Balance, Seen, add_clones, clone_rows, direction, router_weights
from actors.text_routing import choices, expert_modules, router_modules
from actors.whole_weights import WholeWeights
from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from tests.tiny_models import make_tiny
from workloads.bench.learn import Settings, bars, measure
from workloads.bench.learn_baselines import Anchored, LowRank
from workloads.bench.learn_methods import LearnSettings, learn_stream, methods, model_size
from workloads.bench.learn_text import Domain

pytestmark = pytest.mark.slow

SETTINGS = LearnSettings(
    steps=12,
    rows=4,
    length=24,
    rate_all=3e-3,
    rate_chosen=1e-2,
    count_tokens=480,
    row_tokens=480,
    fisher_rows=4,
    most=0.3,
)
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL)).eval()


@pytest.fixture
def model(plain: Any) -> Any:
    return copy.deepcopy(plain)


def domain(name: str, first: int, step: int) -> Domain:
    """Numbers of a range of their own that go up by a step."""
    tokens = np.array([first + n * step % 10 for n in range(2000)], np.int32)
    return Domain(name, tokens[:1500], tokens[1500:1950].reshape(18, 25), 432)


DOMAINS = [domain("ones", 0, 1), domain("threes", 10, 3)]
GENERAL = domain("general", 20, 7)


@pytest.mark.parametrize("method", methods(0.25), ids=lambda method: method.name)
def test_each_way_learns_and_is_counted(model: Any, method: Any) -> None:
    found = learn_stream(model, DOMAINS, GENERAL, method, SETTINGS, seed=0)
    assert [len(row) for row in found.matrix] == [2, 2, 2] and len(found.general) == 3
    if method.trains == "nothing":
        assert found.matrix[0] == found.matrix[2] and found.flops == 0 == found.trained_share
        return
    assert found.matrix[2][1] < found.matrix[1][1] - 0.1 or method.joint
    assert found.matrix[2][0] < found.matrix[0][0] and found.flops > 0
    assert len(found.losses) == 2 * SETTINGS.steps
    if method.trains in ("chosen", "random"):
        assert 0 < found.trained_share <= 0.3 and len(found.experts) == 2
        assert (sum(found.clones) > 0) <= method.clones


def test_a_clone_is_chosen_by_what_is_new_and_not_by_what_is_known(model: Any) -> None:
    new = [DOMAINS[0].learnt[start : start + 24].tolist() for start in range(0, 480, 24)]
    old = [GENERAL.learnt[start : start + 24].tolist() for start in range(0, 480, 24)]
    made = add_clones(model, clone_rows(model, [(0, 2), (1, 5)], new, old))
    assert made == {(0, 2): 8, (1, 5): 8}
    for layer in (0, 1):
        assert choices(model, new)[layer][8] > 0.3 * 480, "of 480 tokens, each of which has two"
        assert choices(model, old)[layer][8] < 0.1 * 480
    experts = expert_modules(model)[1]
    assert torch.equal(experts.gate_up_proj[8], experts.gate_up_proj[5]) and experts.num_experts == 9


def test_a_direction_parts_two_clouds_of_different_sizes() -> None:
    dice = torch.Generator().manual_seed(0)
    new, old = torch.randn(40, 16, generator=dice) + 1, torch.randn(400, 16, generator=dice) - 1
    row = direction(Seen.of(new), Seen.of(old))
    assert (new @ row).mean() > 0.5 and (old @ row).mean() < -0.5


def test_balance_is_one_where_all_experts_are_asked_alike(model: Any) -> None:
    balance = Balance(model, weight=1.0)
    rows = torch.arange(24)[None] % 10
    with balance.watched():
        model(input_ids=rows, use_cache=False)
        even = balance()
        for router in router_modules(model).values():
            # All to one pair of experts.
            router.weight.data[2:] = 0
            router.weight.data[0] = router.weight.data[1] * 1.01
        model(input_ids=rows, use_cache=False)
        uneven = balance()
    assert even is not None and uneven is not None and even >= 0.9
    assert balance() is None, "nothing was heard since"
    model(input_ids=rows, use_cache=False)
    assert balance() is None, "nobody listens any more"


def test_routers_alone_change_in_a_review(model: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = router_weights(model)
    learner = Training(model, weights, TrainSettings(3, rate=1e-2, warm_steps=1))
    rows = torch.tensor([DOMAINS[0].learnt[:24].tolist()] * 2)
    for _ in range(3):
        learner.train(rows)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.endswith("gate.weight") for name in changed)
    with weights.as_before():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    state = weights.state()
    weights.load(state)
    with pytest.raises(LearningError, match="of other weights"):
        weights.load({})
    with (
        pytest.raises(LearningError, match="is not remembered"),
        WholeWeights(model, {}, remember=False).as_before(),
    ):
        pass


def test_a_bias_that_the_choice_alone_sees_evens_out_the_load(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny("deepseek_v3", tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    rows = torch.randint(3, 50, (4, 32), generator=torch.Generator().manual_seed(1))
    layers = [layer.index for layer in checkpoint.moe_layers]

    def uneven() -> float:
        counts = choices(model, rows.tolist())
        return max(max(counts[layer]) / (sum(counts[layer]) / len(counts[layer])) for layer in layers)

    biases, before = BiasBalance(model, 0.02), uneven()
    for _ in range(60):
        model(input_ids=rows, use_cache=False)
        biases.nudge()
    assert uneven() < 1 + (before - 1) / 2
    with biases.as_before():
        assert uneven() == before
    # A pass in which nothing is learnt moves nothing, and a state is taken up again.
    state = biases.state()
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    biases.nudge()
    assert all(torch.equal(bias, state[layer]) for layer, bias in biases.state().items())
    written = biases.tensors(checkpoint)
    assert set(written) == {name for name in checkpoint.tensors if name.endswith("e_score_correction_bias")}
    biases.round_to(checkpoint)
    biases.load({layer: torch.zeros_like(bias) for layer, bias in state.items()})
    assert all(not bias.any() for bias in biases.state().values())
    assert BiasBalance(MixtralForCausalLM(MixtralConfig(**SMALL)), 0.1).state() == {}


def test_adapters_have_the_gradients_of_their_product(model: Any) -> None:
    rows = torch.tensor([DOMAINS[0].learnt[:24].tolist()])
    weights = LowRank(model, rank=2)
    with torch.no_grad():
        for master in weights.masters.values():
            master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    weights.write()
    model(input_ids=rows, labels=rows).loss.backward()
    weights.take_gradients()
    name = "0.gate_up_proj"
    key = (name, "B")
    grad = weights.masters[key].grad
    assert grad is not None
    # Against a finite difference of one number.
    place = tuple(int(i) for i in torch.unravel_index(grad.abs().argmax(), grad.shape))
    losses = []
    for change in (1e-2, -1e-2):
        with torch.no_grad():
            weights.masters[key][place] += change
        weights.write()
        losses.append(model(input_ids=rows, labels=rows).loss.item())
        with torch.no_grad():
            weights.masters[key][place] -= change
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(grad[place].item(), rel=0.05)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with weights.as_before():
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_mattered_is_drawn_back(model: Any) -> None:
    weights = Anchored(model, dict(model.named_parameters()), weight=10.0)
    rows = [DOMAINS[0].learnt[:24].tolist()]
    assert weights.remember(model, rows) == 24
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (weights.importance[name] >= 0).all() and weights.importance[name].max() > 0
    with torch.no_grad():
        weights.masters[name] += 1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights.take_gradients()
    torch.testing.assert_close(weights.masters[name].grad, 10 * weights.importance[name])


def test_the_model_s_size_is_what_a_token_meets(model: Any) -> None:
    attention, expert, out = 4 * 32 * 32, 3 * 32 * 32, 32 * 32
    assert model_size(model).met == 2 * (attention + 2 * expert + 8 * 32) + out
    chosen = ChosenExperts(model, [(0, 1)])
    assert chosen.share == pytest.approx(expert / sum(p.numel() for p in model.parameters()))


def test_a_measurement_has_bars_and_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests run beside it, and two threads on a busy core wait for each other.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    dice = random.Random(0)
    words = {
        "law": ["court", "ruled", "winter", "case", "heard", "long"],
        "code": ["def", "return", "while", "yield", "import"],
        "general": ["the", "a", "of", "river", "boat", "day"],
    }
    texts = {name: [" ".join(dice.choices(known, k=60)) for _ in range(120)] for name, known in words.items()}
    learn = LearnSettings(steps=4, rows=4, length=32, count_tokens=256, row_tokens=256, fisher_rows=2)
    told: list[str] = []
    # Every method is tried out above; in the order in which the report has them.
    names = ("ours", "joint", "naive", "frozen")
    report = measure(
        Settings(
            texts,
            None,
            learn,
            seeds=2,
            methods=names,
            judged_tokens=1000,
            learnt_tokens=20_000,
            small_steps=4,
        ),
        lambda what, done: told.append(what),
    )
    json.dumps(report, allow_nan=False)
    assert list(report["methods"]) == [one.name for one in methods(0.25) if one.name in names] and told
    assert report["domains"] == ["law", "code"] and len(report["methods"]["ours"]["by_seed"]) == 2
    assert report["bars"]["trained_share"]["met"] and report["methods"]["naive"]["gap_closed"] in (0.0, None)
    assert {bar.key for bar in bars({})} == set(report["bars"])
    with pytest.raises(LearningError, match="no method 'ourz'"):
        measure(Settings(texts, None, learn, methods=("ourz",)), lambda what, done: None)
    with pytest.raises(LearningError, match="are too few"):
        measure(Settings({"law": texts["law"]}, None, learn), lambda what, done: None)
