"""Counts of the experts that rows ask for: whatever the sizes of the batches, all of them, once."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.routing_counts import RoutingCounts

EXPERTS = 16


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=8), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_choice_is_counted_once(rows: list[int], top_k: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts, expected = RoutingCounts({1: EXPERTS, 5: EXPERTS}), np.zeros(EXPERTS, np.int64)
    for number in rows:
        # -1 wants no expert.
        ids = generator.integers(-1, EXPERTS, (number, top_k), dtype=np.int32)
        counts.note(5, torch.from_numpy(ids))
        expected += np.bincount(ids[ids >= 0], minlength=EXPERTS)
    taken = counts.take()
    assert taken[5] == tuple(expected)
    assert taken[1] == (0,) * EXPERTS
    assert counts.take()[5] == (0,) * EXPERTS


def test_experts_that_a_version_added_count_for_those_beside_which_they_live() -> None:
    counts = RoutingCounts({1: 3, 2: 3}, 2)
    counts.note(1, torch.tensor([[0, 3], [4, 2], [4, -1]], dtype=torch.int32))
    assert counts.take({1: {3: 1, 4: 2}}) == {1: (1, 1, 3), 2: (0, 0, 0)}
    counts.note(1, torch.tensor([[0, 2]], dtype=torch.int32))
    assert counts.take() == {1: (1, 0, 1), 2: (0, 0, 0)}
