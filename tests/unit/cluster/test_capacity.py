"""Rows per expert and step, which pairs are over it, and the two controllers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cluster.capacity import adapt, capacity, drop, load, overflow, token_budget
from cluster.messages import CapacitySettings

EXPERTS, TOP_K = 6, 3


@st.composite
def routed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K], distinct in a row, some of them -1; weights of few values, so that many are equal."""
    rows = draw(st.integers(1, 24))
    order = np.random.default_rng(draw(st.integers(0, 2**32))).random((rows, EXPERTS)).argsort(axis=1)
    ids = np.where(draw(arrays(bool, (rows, TOP_K))), order[:, :TOP_K], -1).astype(np.int32)
    weights = draw(arrays(np.float32, (rows, TOP_K), elements=st.sampled_from([0.125, 0.25, 0.5, 0.75])))
    return ids, weights


@pytest.mark.parametrize(
    ("rows", "coefficient", "expected"),
    [
        (1, 8.0, 5),  # 4 of base, 8/256 of them more, rounded up
        (64, 0.0, 20),  # 1.25 × 64 × 2 / 8
        (64, 4.0, 40),  # a quarter full: twice as many
        (256, 1.0, 160),
        (512, 1.0, 320),  # a step beyond the largest is full, not more
    ],
)
def test_capacity_is_base_times_one_and_coefficient_times_load(
    rows: int, coefficient: float, expected: int
) -> None:
    found = capacity(CapacitySettings(), coefficient, rows=rows, top_k=2, experts=8, largest=256)
    assert found == expected


def test_a_whole_number_is_not_rounded_up() -> None:
    wanted = CapacitySettings(factor=1.1, min_rows=1)
    assert capacity(wanted, 0.0, rows=10, top_k=1, experts=1, largest=10) == 11  # 11.000000000000002


@given(routed(), st.integers(1, 8))
def test_what_is_over_is_what_a_loop_finds(batch: tuple[np.ndarray, np.ndarray], most: int) -> None:
    ids, weights = batch
    expected = np.zeros(ids.shape, bool)
    for expert in range(EXPERTS):
        pairs = [tuple(pair) for pair in np.argwhere(ids == expert)]
        pairs.sort(key=lambda pair: -weights[pair])  # stable: of equal ones the later rows go
        for pair in pairs[most:]:
            expected[pair] = True
    assert (overflow(ids, weights, most, EXPERTS) == expected).all()


@given(routed(), st.integers(1, 8))
def test_a_row_that_loses_pairs_keeps_its_sum(batch: tuple[np.ndarray, np.ndarray], most: int) -> None:
    ids, weights = batch
    over = overflow(ids, weights, most, EXPERTS)
    new_ids, new_weights = drop(ids, weights, over)
    assert (new_ids[over] == -1).all() and (new_ids[~over] == ids[~over]).all()
    assert (new_weights[over] == 0).all()
    whole, empty = ~over.any(axis=1), over.all(axis=1)
    assert (new_weights[whole] == weights[whole]).all()
    np.testing.assert_allclose(new_weights.sum(1)[~empty], weights.sum(1)[~empty], rtol=1e-6)
    assert (new_weights[empty] == 0).all()


def share_over(counts: np.ndarray, coefficient: float, full: float, factor: float) -> float:
    """Share of a step's pairs that overflow, with a capacity that is not rounded."""
    most = factor * counts.mean() * (1 + coefficient * full)
    return float(np.maximum(counts - most, 0).sum() / counts.sum())


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=16).filter(any),
    st.floats(0, 1),
    st.floats(0.1, 4),
    st.floats(0, 8),
    st.floats(0, 0.9),
)
def test_a_step_s_adaptation_comes_nearer_to_the_target_and_not_past_it(
    counts: list[int], full: float, factor: float, coefficient: float, target: float
) -> None:
    told, loads = CapacitySettings(factor=factor, target=target), np.array(counts, float)
    before = share_over(loads, coefficient, full, factor) - target
    adapted = adapt(told, coefficient, full, before + target)
    assert told.coefficient_min <= adapted <= told.coefficient_max
    after = share_over(loads, adapted, full, factor) - target
    assert abs(after) <= abs(before) + 1e-9
    assert after * before >= -1e-9


def test_skewed_traffic_gets_the_room_that_it_needs_and_gives_it_back() -> None:
    told = CapacitySettings(target=0.02)
    skewed, even = np.array([300, 100, 60, 20, 20, 6, 4, 2]), np.full(8, 64)
    coefficient = told.coefficient
    shares = []
    for counts in [skewed] * 60 + [even] * 300:
        rows = int(counts.sum()) // 2
        most = capacity(told, coefficient, rows=rows, top_k=2, experts=8, largest=256)
        shares.append(np.maximum(counts - most, 0).sum() / counts.sum())
        coefficient = adapt(told, coefficient, load(rows, 256), float(shares[-1]))
    assert shares[0] > 0.2 and 0.01 < shares[59] < 0.03
    assert coefficient == 0


def test_small_steps_do_not_drive_the_coefficient_to_its_bound() -> None:
    told = CapacitySettings()
    coefficient = 1.0
    for _ in range(1000):
        coefficient = adapt(told, coefficient, load(2, 2048), 0.3)
    assert coefficient < 1.15


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 64)), max_size=40), st.floats(0, 0.5))
def test_a_budget_stays_within_its_bounds_and_grows_back(
    steps: list[tuple[float, int]], target: float
) -> None:
    largest = budget = 256
    for share, running in steps:
        before = budget
        budget = token_budget(budget, largest, scheduled=before, running=running, share=share, target=target)
        assert max(32, running) <= budget <= largest
        assert (
            budget <= before if share > target and running <= before else budget >= before or share > target
        )
    for _ in range(8):
        budget = token_budget(budget, largest, scheduled=0, running=0, share=0.0, target=target)
    assert budget == largest


def test_a_budget_is_less_by_the_share_that_overflowed() -> None:
    def after(**changes: float) -> int:
        told = {"scheduled": 200, "running": 4, "share": 0.25, "target": 0.01, **changes}
        return token_budget(256, 256, **told)  # type: ignore[arg-type]

    assert after() == 150
    assert after(scheduled=20) == 32, "a small step is no overload"
    assert after(share=0.01) == 256
    assert after(running=170) == 170
