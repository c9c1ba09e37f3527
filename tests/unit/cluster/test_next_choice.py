from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity import overflow
from cluster.gate import NEVER
from cluster.next_choice import next_choices

EXPERTS, TOP_K = 6, 3


@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 12), st.sets(st.integers(0, EXPERTS - 1)))
def test_pairs_go_where_there_is_room_and_stay_where_there_is_none(
    seed: int, rows: int, most: int, closed: set[int]
) -> None:
    random = np.random.default_rng(seed)
    # Skewed, so that some experts are over any capacity.
    preferences = random.normal(size=(rows, EXPERTS)) - np.arange(EXPERTS)
    ids = np.argsort(-preferences, axis=1)[:, :TOP_K].astype(np.int32)
    weights = random.random((rows, TOP_K)).astype(np.float32)
    preferences[:, list(closed)] = NEVER
    over = overflow(ids, weights, most, EXPERTS)
    room = most - np.bincount(ids[~over], minlength=EXPERTS)
    new = next_choices(ids, weights, over, preferences, room)

    assert (new[~over] == ids[~over]).all()
    counts = np.bincount(new[new >= 0], minlength=EXPERTS)
    assert (counts <= most).all()
    moved = over & (new >= 0)
    assert not closed & set(new[moved].tolist())
    for row in range(rows):
        taken = [expert for expert in new[row] if expert >= 0]
        assert len(set(taken)) == len(taken)
        assert not set(new[row][moved[row]]) & set(ids[row])
        for slot in np.flatnonzero(over[row]):
            free = set(range(EXPERTS)) - closed - set(ids[row]) - set(taken)
            worse = {
                e
                for e in free
                if new[row, slot] < 0 or preferences[row, e] > preferences[row, new[row, slot]]
            }
            # Whatever it would rather have is full at the end, and nothing is left where it was dropped.
            assert all(counts[expert] == most for expert in worse)


def test_the_heavier_pair_chooses_first() -> None:
    ids, weights = np.array([[0], [0], [0]], np.int32), np.array([[0.5], [0.2], [0.3]], np.float32)
    preferences = np.array([[3.0, 2.0, 1.0]] * 3)
    over = overflow(ids, weights, 1, 3)
    assert next_choices(ids, weights, over, preferences, np.array([0, 1, 1])).ravel().tolist() == [0, 2, 1]
    assert next_choices(ids, weights, over, preferences, np.array([0, 1, 0])).ravel().tolist() == [0, -1, 1]


def test_a_row_with_two_pairs_takes_two_experts() -> None:
    ids, over = np.array([[0, 1]], np.int32), np.array([[True, True]])
    preferences = np.array([[9.0, 8.0, 7.0, 6.0]])
    new = next_choices(ids, np.array([[0.4, 0.6]]), over, preferences, np.array([0, 0, 5, 5]))
    assert new.tolist() == [[3, 2]], "the heavier pair has the better one"
