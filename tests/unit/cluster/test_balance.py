"""The split over replicas against the exact optimum of a linear programme."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fleet import HostCost
from cluster.split import LayerSplit
from workloads.bench.placement_exact import least_split


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[list[int]], np.ndarray, list[float]]:
    hosts = draw(st.integers(1, 6))
    speeds = [draw(st.sampled_from((1.0, 4.0, 16.0))) for _ in range(hosts)]
    experts = draw(st.integers(1, 10))
    held = [
        draw(st.lists(st.integers(0, hosts - 1), min_size=1, max_size=hosts, unique=True))
        for _ in range(experts)
    ]
    rows = np.array([draw(st.integers(0, 50)) for _ in range(experts)], np.float64)
    return held, rows, speeds


@given(layers())
@settings(max_examples=60, deadline=None)
def test_no_split_is_better(layer: tuple[list[list[int]], np.ndarray, list[float]]) -> None:
    held, rows, speeds = layer
    split = LayerSplit(held, [HostCost(per_row_s=1 / speed) for speed in speeds], sweeps=2000, tolerance=1e-9)
    shares = split.update(rows)
    assert split.seconds.max() == pytest.approx(least_split(held, rows, speeds), rel=1e-3, abs=1e-6)
    for expert, hosts in enumerate(held):
        assert shares[expert, : len(hosts)].sum() == pytest.approx(1.0)
        assert shares[expert].min() >= 0.0
    # What it says of the hosts is what its shares come to.
    made = np.zeros(len(speeds))
    for expert, hosts in enumerate(held):
        for j, host in enumerate(hosts):
            made[host] += shares[expert, j] * rows[expert] / speeds[host]
    assert split.seconds == pytest.approx(made, abs=1e-9)


def test_it_goes_on_from_the_last_step() -> None:
    split = LayerSplit([[0, 1], [0], [1]], [HostCost(per_row_s=1.0)] * 2)
    split.update(np.array([10.0, 6.0, 0.0]))
    assert split.seconds == pytest.approx([8.0, 8.0], rel=1e-2)
    split.update(np.array([10.0, 0.0, 6.0]))
    assert split.seconds == pytest.approx([8.0, 8.0], rel=1e-2)


def test_a_step_without_rows() -> None:
    split = LayerSplit([[0, 1], [1]], [HostCost(fixed_s=0.5)] * 2)
    split.update(np.zeros(2))
    assert split.seconds == pytest.approx([0.5, 0.5])
