"""When traffic counts as changed: not by chance, however much windows stray, and soon after it did."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing_change import fresh

LAYERS, EXPERTS, WINDOWS = 3, 24, 32
_SPREAD = 60.0


def task(seed: int) -> np.ndarray:
    """Shares of the experts [L, E], some hot, some nearly dead."""
    return np.random.default_rng(seed).dirichlet(np.full(EXPERTS, 0.5), LAYERS)


def windows(
    shares: np.ndarray, number: int, seed: int, *, strays: bool = True, tokens: int = 300
) -> np.ndarray:
    """Counts of a task's windows; texts are alike within a window, so that they stray more than tokens alone do."""
    rng = np.random.default_rng((7, seed))
    found = np.empty((number, LAYERS, EXPERTS))
    for window in range(number):
        for layer in range(LAYERS):
            here = rng.dirichlet(shares[layer] * _SPREAD + 1e-3) if strays else shares[layer]
            found[window, layer] = rng.multinomial(tokens, here)
    return found


@given(seed=st.integers(0, 10_000), number=st.integers(1, 40), strays=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_steady_traffic_keeps_all_its_windows(seed: int, number: int, strays: bool) -> None:
    counts = windows(task(seed), number, seed, strays=strays)
    assert len(fresh(counts)) == number


@given(seed=st.integers(0, 10_000), newer=st.integers(8, 27))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_another_task_leaves_its_own_windows(seed: int, newer: int) -> None:
    old = windows(task(seed), WINDOWS - newer, seed, strays=False)
    new = windows(task(seed + 1), newer, seed, strays=False)
    assert np.array_equal(fresh(np.concatenate([old, new])), new)


@pytest.mark.parametrize("seed", range(10))
def test_it_is_seen_through_windows_that_stray(seed: int) -> None:
    old = windows(task(seed), 20, seed)
    new = windows(task(seed + 1), 12, seed + 1)
    assert np.array_equal(fresh(np.concatenate([old, new])), new)


def test_what_has_only_begun_is_no_change_yet() -> None:
    old, new = windows(task(0), 29, 0, strays=False), windows(task(1), 3, 0, strays=False)
    counts = np.concatenate([old, new])
    assert fresh(counts) is counts


def test_of_two_changes_the_later_one_counts() -> None:
    parts = [windows(task(n), 12, n, strays=False) for n in range(3)]
    assert np.array_equal(fresh(np.concatenate(parts)), parts[-1])


def test_short_and_long_windows_of_one_task_are_alike() -> None:
    parts = [windows(task(0), 4, n, strays=False, tokens=tokens) for n, tokens in enumerate((2000, 30) * 4)]
    counts = np.concatenate(parts)
    assert len(fresh(counts)) == len(counts)


def test_windows_and_layers_without_traffic() -> None:
    assert len(fresh(np.zeros((1, 2, 4)))) == 1
    assert len(fresh(np.zeros((16, 2, 4)))) == 16
    counts = windows(task(0), 32, 0)
    counts[:, 1] = 0.0
    counts[::5] = 0.0
    assert len(fresh(counts)) == 32


def test_windows_that_never_stray_and_then_do() -> None:
    counts = np.tile([[[3.0, 1.0]]], (16, 1, 1))
    counts[8:] = [[1.0, 3.0]]
    assert np.array_equal(fresh(counts), counts[8:])
