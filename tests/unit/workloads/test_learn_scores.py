"""Scores of a matrix of bits per byte, by hand."""

from __future__ import annotations

import pytest

from workloads.bench.learn import bars
from workloads.bench.learn_scores import gap_closed, scores

#          a    b    c
MATRIX = [
    [3.0, 4.0, 5.0],
    [1.0, 4.2, 4.8],
    [1.3, 2.0, 4.6],
    [1.2, 2.5, 3.0],
]


def test_scores_are_as_defined() -> None:
    found = scores(MATRIX, [1.0, 1.1, 1.2, 1.25])
    assert found.average == pytest.approx((1.2 + 2.5 + 3.0) / 3)
    assert found.backward_transfer == pytest.approx(((1.0 - 1.2) + (2.0 - 2.5)) / 2)
    assert found.forgetting == pytest.approx((0.2 + 0.5) / 2)
    assert found.forward_transfer == pytest.approx(((4.0 - 4.2) + (5.0 - 4.6)) / 2)
    assert found.retention == pytest.approx(0.8)


def test_what_became_better_later_is_not_forgotten() -> None:
    found = scores([[3.0, 3.0], [2.0, 3.0], [1.5, 2.0]], [1.0, 1.0, 0.9])
    assert found.forgetting == 0.0 and found.backward_transfer == 0.5 and found.retention > 1
    # The best since it was learnt counts, not only what it was right after.
    assert scores([[3.0] * 3, [2.0] * 3, [1.0] * 3, [1.5] * 3], [1.0] * 4).forgetting == pytest.approx(0.5)


def test_the_gap_is_that_between_naive_and_joint() -> None:
    assert gap_closed(1.2, naive=2.0, joint=1.0) == pytest.approx(0.8)
    assert gap_closed(2.5, naive=2.0, joint=1.0) == pytest.approx(-0.5)
    assert gap_closed(1.0, naive=1.0, joint=1.2) is None


@pytest.mark.parametrize("general", [[1.0], [1.0] * 5])
def test_a_matrix_of_another_shape_is_refused(general: list[float]) -> None:
    with pytest.raises(ValueError, match="4 rows"):
        scores(MATRIX, general)
    with pytest.raises(ValueError):
        scores([[1.0]], [1.0])


def test_bars_are_of_ours_against_naive() -> None:
    ours = {"forgetting": 0.02, "gap_closed": 0.9, "retention": 0.98, "trained_share": 0.2}
    found = {bar.key: bar for bar in bars({"ours": ours, "naive": {"forgetting": 0.1}})}
    assert found["forgetting_of_naive"].value == pytest.approx(0.2) and not found["forgetting_of_naive"].met
    assert found["gap_closed"].met and found["retention"].met and not found["trained_share"].met
    assert all(bar.met is None for bar in bars({}))
