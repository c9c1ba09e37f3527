"""Which samples are learnt from, if not all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LearningError
from cluster.learning.select import most_uncertain


def test_what_surprises_most_is_learnt_but_not_noise() -> None:
    surprises = [1.0, 5.0, 2.0, 9.0, 3.0, 4.0]
    assert most_uncertain(surprises, 0.5, outliers=0.2) == [1, 4, 5], "the one of 9 nats is noise"
    assert most_uncertain(surprises, 0.5, outliers=0.0) == [1, 3, 5]
    assert most_uncertain(surprises, 1.0) == list(range(6)), "nothing is left out where all are wanted"
    assert most_uncertain([1.0, math.nan, 2.0, math.inf], 1.0) == [0, 2]
    assert most_uncertain([7.0], 0.01) == [0]


def test_what_is_no_share_is_refused() -> None:
    for share, outliers in ((0.0, 0.1), (1.1, 0.1), (0.5, 1.0)):
        with pytest.raises(LearningError, match="no shares"):
            most_uncertain([1.0], share, outliers)
    with pytest.raises(LearningError, match="none of the samples"):
        most_uncertain([math.nan], 0.5)


@given(
    st.lists(st.floats(0, 20), min_size=1, max_size=60),
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.5),
)
def test_as_many_as_asked_for_and_none_more_certain_than_one_left_out(
    surprises: list[float], share: float, outliers: float
) -> None:
    found = most_uncertain(surprises, share, outliers)
    assert len(found) == max(1, round(share * len(surprises))) and found == sorted(set(found))
    left = [number for number in range(len(surprises)) if number not in found]
    above = [number for number in left if surprises[number] > min(surprises[n] for n in found)]
    assert len(above) <= outliers * len(surprises)
