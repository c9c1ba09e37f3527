"""Windows of routing counts, and what they say in short."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.routing_windows import RoutingWindows, scenarios, summary


def test_windows_forget_the_oldest() -> None:
    windows = RoutingWindows(1, 2, windows=2, tokens=10)
    for counts in ([10, 0], [5, 5], [0, 10]):
        windows.add(np.array([counts]), 10)
    assert scenarios(windows.counts(), 0.0)[:, 0].tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_scenarios_are_drawn_to_their_mean() -> None:
    windows = RoutingWindows(1, 2, windows=2, tokens=10)
    windows.add(np.array([[10, 0]]), 10)
    windows.add(np.array([[0, 10]]), 10)
    assert scenarios(windows.counts(), 1.0)[:, 0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert scenarios(windows.counts(), 0.5)[:, 0].tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_without_traffic_all_experts_are_alike() -> None:
    assert scenarios(RoutingWindows(2, 4).counts()).tolist() == [[[0.25] * 4] * 2]


def test_a_window_counts_once_it_is_half_full() -> None:
    windows = RoutingWindows(1, 2, windows=4, tokens=10)
    windows.add(np.array([[10, 0]]), 10)
    windows.add(np.array([[0, 4]]), 4)
    assert len(windows.counts()) == 1
    windows.add(np.array([[0, 1]]), 1)
    assert len(windows.counts()) == 2


def test_a_layer_in_three_numbers() -> None:
    even = summary(np.array([5, 5, 5, 5]))
    assert (even.max_over_mean, even.dead_share) == (1.0, 0.0)
    assert even.effective_experts == pytest.approx(4.0)
    one = summary(np.array([9, 0, 0, 0]))
    assert (one.max_over_mean, one.dead_share, one.effective_experts) == (4.0, 0.75, 1.0)
    assert summary(np.zeros(4)).max_over_mean == 0.0
