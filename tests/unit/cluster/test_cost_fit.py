"""Costs from timings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cost_fit import Timing, corrected, fit, median_error, next_factor
from cluster.fleet import HostCost

SHAPES = [
    (rows, experts) for rows in (1, 2, 4, 16, 64, 256, 1024) for experts in (1, 2, 4, 8) if experts <= rows
]

parts = st.just(0.0) | st.floats(1e-6, 1e-3)


@given(parts, parts, parts)
@settings(max_examples=60, deadline=None)
def test_a_cost_is_found_again(fixed: float, per_expert: float, per_row: float) -> None:
    if per_expert + per_row == 0:
        return
    cost = HostCost(fixed, per_expert, per_row)
    timings = [Timing(rows, experts, cost.seconds(rows, experts)) for rows, experts in SHAPES]
    assert median_error(fit(timings), timings) < 1e-6


def test_noise_is_averaged() -> None:
    rng = np.random.default_rng(0)
    cost = HostCost(5e-5, 2e-4, 1e-5)
    noisy = [
        Timing(rows, experts, cost.seconds(rows, experts) * float(rng.lognormal(0, 0.1)))
        for rows, experts in SHAPES
        for _ in range(5)
    ]
    found = fit(noisy)
    clean = [Timing(rows, experts, cost.seconds(rows, experts)) for rows, experts in SHAPES]
    assert median_error(found, clean) < 0.05


def test_no_part_is_below_zero() -> None:
    # Fewer seconds for more experts: a line through them would fall.
    found = fit([Timing(8, 1, 1e-3), Timing(8, 8, 0.5e-3), Timing(64, 1, 5e-3), Timing(64, 8, 4e-3)])
    assert min(found.fixed_s, found.per_expert_s, found.per_row_s) >= 0


@pytest.mark.parametrize("timings", [[], [Timing(1, 1, 0.0)]])
def test_nothing_to_fit(timings: list[Timing]) -> None:
    with pytest.raises(ValueError, match="timings"):
        fit(timings)


def test_a_host_that_became_slower_is_learnt_and_forgiven() -> None:
    cost, factor = HostCost(per_row_s=1e-6), 1.0
    slow = [Timing(100, 4, 3e-4)] * 9 + [Timing(100, 4, 5.0)]  # one stall among them says nothing
    for _ in range(30):
        factor = next_factor(factor, cost, slow)
    assert factor == pytest.approx(3.0, rel=0.01)
    assert corrected(cost, factor).seconds(100, 4) == pytest.approx(3e-4, rel=0.01)
    for _ in range(30):
        factor = next_factor(factor, cost, [Timing(100, 4, 1e-4)])
    assert factor == pytest.approx(1.0, rel=0.01)
    assert next_factor(factor, cost, []) == factor


def test_a_factor_stays_within_reason() -> None:
    cost, factor = HostCost(per_row_s=1e-6), 1.0
    for _ in range(100):
        factor = next_factor(factor, cost, [Timing(1, 1, 10.0)])
    assert factor == 8.0
    for _ in range(100):
        factor = next_factor(factor, cost, [Timing(1000, 1, 1e-9)])
    assert factor == pytest.approx(1 / 8)
