"""A gate's preferences and weights, against the choice written down as its papers have it."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.gate import NEVER, Gate

ROWS, EXPERTS, TOP_K = 50, 12, 4
BIAS = np.random.default_rng(1).normal(size=EXPERTS).astype(np.float32)
GATES = {
    "mixtral": Gate(),
    "olmoe": Gate(renormalize=False),
    "deepseek-v2": Gate(renormalize=False, groups=4, top_groups=2),
    "deepseek-v3": Gate("sigmoid", bias=BIAS, groups=4, top_groups=2),
    "sigmoid": Gate("sigmoid", renormalize=False),
}


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(ROWS, EXPERTS)).astype(np.float32) * 3


def plain_choice(gate: Gate, logits: np.ndarray) -> tuple[set[int], np.ndarray]:
    """One row's experts and everybody's score."""
    scores = 1 / (1 + np.exp(-logits)) if gate.scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    for_choice = scores if gate.bias is None else scores + gate.bias
    size = EXPERTS // gate.groups
    groups = [range(group * size, (group + 1) * size) for group in range(gate.groups)]
    speak = 1 if gate.bias is None else 2
    groups.sort(key=lambda group: -sum(sorted(for_choice[list(group)])[-speak:]))
    allowed = [expert for group in groups[: gate.top_groups] for expert in group]
    return set(sorted(allowed, key=lambda expert: -for_choice[expert])[:TOP_K]), scores


@pytest.mark.parametrize("name", GATES)
def test_the_most_preferred_are_the_gate_s_choice(name: str, logits: np.ndarray) -> None:
    gate = GATES[name]
    preferred = np.argsort(-gate.preferences(logits), axis=1)[:, :TOP_K]
    for row in range(ROWS):
        assert set(preferred[row]) == plain_choice(gate, logits[row])[0]


@pytest.mark.parametrize("name", GATES)
def test_new_experts_get_what_the_gate_gives_them(name: str, logits: np.ndarray) -> None:
    gate, scale = GATES[name], 2.5
    old = np.argsort(-gate.preferences(logits), axis=1)[:, :TOP_K]
    new = old.copy()
    new[:, 1] = np.argsort(-logits, axis=1)[:, TOP_K + 1]

    def weights(ids: np.ndarray) -> np.ndarray:
        rows = np.stack([plain_choice(gate, row)[1][chosen] for row, chosen in zip(logits, ids, strict=True)])
        return scale * (rows / rows.sum(1, keepdims=True) if gate.renormalize else rows)

    found = gate.reweigh(logits, weights(old).astype(np.float32), old, new)
    np.testing.assert_allclose(found, weights(new), rtol=1e-4)


def test_masked_logits_and_broken_ones_are_never_chosen(logits: np.ndarray) -> None:
    logits[:, 2] = np.finfo(np.float32).min / 2
    logits[:, 3] = -np.inf
    logits[:, 4] = np.nan
    for gate in (GATES["mixtral"], GATES["sigmoid"]):
        assert (gate.preferences(logits)[:, 2:5] == NEVER).all()


def test_scores_that_vanish_still_have_an_order_and_weights() -> None:
    logits = np.array([[0.0, -300.0, -200.0, 400.0]], np.float32)
    gate = Gate()
    assert np.argsort(-gate.preferences(logits))[0].tolist() == [3, 0, 2, 1]
    weights = gate.reweigh(logits, np.array([[1.0, 0.0]], np.float32), np.array([[3, 0]]), np.array([[1, 2]]))
    assert weights.sum() == pytest.approx(1)
