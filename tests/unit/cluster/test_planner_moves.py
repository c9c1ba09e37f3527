"""Which of all layers' moves are made under a limit."""

from __future__ import annotations

import numpy as np

from cluster.planner_moves import affordable


def layer(blobs: list[int], gains: list[float], needed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    path = np.zeros((len(blobs), 6), np.int64)
    path[:, 5] = blobs
    return path, np.array(gains), needed


def test_all_without_a_limit() -> None:
    assert affordable([layer([1, 2], [1.0, 2.0]), layer([], [])], None) == [2, 0]


def test_the_most_seconds_per_blob_come_first() -> None:
    layers = [layer([1, 2, 3], [1.0, 1.1, 1.2]), layer([2, 4], [6.0, 6.5])]
    assert affordable(layers, 2) == [0, 1]
    assert affordable(layers, 3) == [1, 1]
    assert affordable(layers, 100) == [3, 2]


def test_a_move_that_pays_only_with_the_next_one_is_taken_with_it() -> None:
    assert affordable([layer([1, 2], [0.0, 10.0]), layer([1], [3.0])], 2) == [2, 0]


def test_what_must_be_loaded_counts_but_is_never_refused() -> None:
    assert affordable([layer([3, 4], [1.0, 2.0], needed=2)], 2) == [0]
    assert affordable([layer([3, 4], [1.0, 2.0], needed=2)], 3) == [1]


def test_moves_that_load_nothing_are_free() -> None:
    assert affordable([layer([0, 0], [1.0, 2.0])], 0) == [2]
