"""The test that may be looked at all the time: rarely wrong, and right before long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.betting import Comparison

ALPHA = 0.05


def looked_at_each_time(differences: np.ndarray, comparison: Comparison) -> tuple[int, int]:
    """After how many observations it was called worse, and fine; -1 for never."""
    worse = fine = -1
    for number, difference in enumerate(differences.tolist(), 1):
        comparison = comparison.after([difference])
        worse = number if worse < 0 and comparison.is_worse(ALPHA) else worse
        fine = number if fine < 0 and comparison.is_fine(ALPHA) else fine
    return worse, fine


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_what_is_no_worse_is_rarely_called_so_however_often_one_looks(spread: float) -> None:
    dice = np.random.default_rng(1)
    called = [looked_at_each_time(dice.normal(0.0, spread, 400), Comparison())[0] > 0 for _ in range(200)]
    assert sum(called) <= 200 * ALPHA + 3 * (200 * ALPHA * (1 - ALPHA)) ** 0.5


def test_what_is_just_too_bad_is_rarely_called_fine() -> None:
    dice = np.random.default_rng(2)
    called = [looked_at_each_time(dice.normal(0.1, 0.3, 400), Comparison())[1] > 0 for _ in range(200)]
    assert sum(called) <= 200 * ALPHA + 3 * (200 * ALPHA * (1 - ALPHA)) ** 0.5


def test_what_is_worse_is_found_and_what_is_equal_is_found_fine() -> None:
    dice = np.random.default_rng(3)
    for _ in range(20):
        worse, fine = looked_at_each_time(dice.normal(0.3, 0.3, 300), Comparison())
        assert 0 < worse < 100 and fine == -1
        worse, fine = looked_at_each_time(dice.normal(0.0, 0.1, 300), Comparison())
        assert worse == -1 and 0 < fine < 200


def test_errors_of_one_in_ten_requests_are_found() -> None:
    dice = np.random.default_rng(4)
    found = [
        looked_at_each_time((dice.random(400) < 0.1) * 1.0, Comparison(tolerance=0.01))[0] for _ in range(20)
    ]
    assert all(0 < number < 250 for number in found)


def test_a_tolerance_is_tolerated() -> None:
    dice = np.random.default_rng(5)
    tolerant = Comparison(tolerance=0.2, margin=0.4)
    called = [looked_at_each_time(dice.normal(0.2, 0.3, 300), tolerant)[0] > 0 for _ in range(100)]
    assert sum(called) <= 100 * ALPHA + 3 * (100 * ALPHA * (1 - ALPHA)) ** 0.5


@given(st.lists(st.floats(-5, 5), max_size=60), st.integers(0, 60))
def test_it_does_not_matter_in_how_many_parts_observations_come(differences: list[float], cut: int) -> None:
    whole = Comparison().after(differences)
    assert Comparison().after(differences[:cut]).after(differences[cut:]) == whole and whole.seen == len(
        differences
    )
    if differences:
        clipped = [min(max(d, -1.0), 1.0) for d in differences]
        assert whole.mean == pytest.approx(sum(clipped) / len(clipped))


def test_a_margin_within_the_tolerance_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="not above a tolerance"):
        Comparison(tolerance=0.2, margin=0.1)
