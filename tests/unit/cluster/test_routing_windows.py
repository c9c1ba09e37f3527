"""Windows of routing counts, and what they say in short."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.routing_windows import RoutingWindows, scenarios, summary


def test_windows_forget_the_oldest() -> None:
    windows = RoutingWindows(1, 2, windows=2, tokens=10)
    for counts in ([10, 0], [5, 5], [0, 10]):
        windows.add(np.array([counts]), 10)
    assert windows.counts()[:, 0].tolist() == [[5, 5], [0, 10]]


def test_scenarios_stray_as_far_as_what_comes() -> None:
    """Held against many repetitions: windows of a task, then as many more, whose mean is what comes."""
    rng, number = np.random.default_rng(0), 8
    shares = np.array([0.5, 0.3, 0.2])
    drawn, real = [], []
    for _ in range(400):
        counts = rng.multinomial(50, shares, (2 * number, 1)).astype(np.float64)
        known, comes = counts[:number], counts[number:].mean(axis=0) / 50
        found = scenarios(known)
        mean = known.mean(axis=0) / 50
        assert found.mean(axis=0) == pytest.approx(mean)
        drawn.append(((found - mean) ** 2).mean())
        real.append(((comes - mean) ** 2).mean())
    assert np.mean(drawn) == pytest.approx(np.mean(real), rel=0.1)


def test_short_windows_are_not_taken_for_wilder_ones() -> None:
    """Three windows of one task: the short one strays more by chance alone, and is drawn in by as much."""
    counts = np.array([[[40.0, 60.0]], [[60.0, 40.0]], [[0.0, 1.0]]])
    found = scenarios(counts)[:, 0, 0]
    mean = 100 / 201
    assert abs(found[2] - mean) == pytest.approx(mean * np.sqrt(3 / 201))


def test_a_single_window_is_all_that_is_known() -> None:
    assert scenarios(np.array([[[3.0, 1.0]]])).tolist() == [[[0.75, 0.25]]]


def test_shares_are_never_negative() -> None:
    assert scenarios(np.array([[[10.0, 0.0]], [[0.0, 10.0]]])).min() == 0.0


def test_without_traffic_all_experts_are_alike() -> None:
    assert scenarios(RoutingWindows(2, 4).counts()).tolist() == [[[0.25] * 4] * 2]


def test_a_window_counts_once_it_is_half_full() -> None:
    windows = RoutingWindows(1, 2, windows=4, tokens=10)
    windows.add(np.array([[10, 0]]), 10)
    windows.add(np.array([[0, 4]]), 4)
    assert len(windows.counts()) == 1
    windows.add(np.array([[0, 1]]), 1)
    assert len(windows.counts()) == 2


def test_after_a_change_the_windows_before_it_are_forgotten() -> None:
    rng, windows = np.random.default_rng(0), RoutingWindows(1, 4, windows=16, tokens=100)
    assert windows.forget() == 0
    for _ in range(20):
        windows.add(rng.multinomial(100, [0.4, 0.3, 0.2, 0.1], (1,)), 100)
    assert windows.forget() == 0 and len(windows.counts()) == 16
    for _ in range(6):
        windows.add(rng.multinomial(100, [0.1, 0.2, 0.3, 0.4], (1,)), 100)
    assert windows.forget() == 10 and windows.forget() == 0
    assert len(windows.counts()) == 6


def test_a_layer_in_three_numbers() -> None:
    even = summary(np.array([5, 5, 5, 5]))
    assert (even.max_over_mean, even.dead_share) == (1.0, 0.0)
    assert even.effective_experts == pytest.approx(4.0)
    one = summary(np.array([9, 0, 0, 0]))
    assert (one.max_over_mean, one.dead_share, one.effective_experts) == (4.0, 0.75, 1.0)
    assert summary(np.zeros(4)).max_over_mean == 0.0
