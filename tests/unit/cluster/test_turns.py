from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from cluster.turns import first_asked

some_holders = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), max_size=6)


def cost(asked: tuple[int, ...] | list[int], weights: list[int]) -> Fraction:
    return sum((Fraction(n * n, weights[host]) for host, n in Counter(asked).items()), Fraction(0))


@given(some_holders, st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_no_other_choice_divides_the_turns_better(holders: list[list[int]], weights: list[int]) -> None:
    asked = first_asked(holders, weights)
    assert all(host in hosts for host, hosts in zip(asked, holders, strict=True))
    assert cost(asked, weights) == min(cost(other, weights) for other in product(*holders))


def test_hosts_that_hold_the_only_copies_are_relieved_of_the_others() -> None:
    # Taken in order, both shared experts would fall to host 0 before it is known to be the only one for more.
    assert Counter(first_asked([[0, 1], [0, 1], [0], [0]], [1, 1])) == {0: 2, 1: 2}
    assert first_asked([[2, 0], [0, 1], [1]], [1, 1, 1]) == [2, 0, 1]
