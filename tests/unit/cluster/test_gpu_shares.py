"""Shares of GPUs: whoever is laid onto a node finds room there, in whatever order Ray is asked."""

from __future__ import annotations

from decimal import Decimal
from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gpu_shares import NodeGpus, always_granted, turns


def shares(*written: str) -> tuple[Decimal, ...]:
    return tuple(map(Decimal, written))


# As Ray 2.60 granted them on a node with two GPUs.
@pytest.mark.parametrize(
    ("asked", "where"),
    [
        (shares("0.6", "0.6", "0.4", "0.4"), [0, 1, 0, 1]),
        (shares("0.3", "0.7", "1"), [0, 0, 1]),
        (shares(*["0.1"] * 10, "1"), [*[0] * 10, 1]),
        (shares("0.3", "0.3", "0.3", "0.5"), [0, 0, 0, 1]),
    ],
)
def test_shares_come_from_the_fullest_gpu_with_room(asked: tuple[Decimal, ...], where: list[int]) -> None:
    assert turns(2, asked) == where


def test_a_share_comes_from_one_gpu() -> None:
    with pytest.raises(ValueError, match=r"no GPU has 0\.6 left"):
        turns(2, shares("0.4", "0.4", "0.6", "0.6"))
    assert not always_granted(2, shares("0.5", "0.5"), shares("0.6"), shares("1"))
    assert not always_granted(0, shares("0.1"))


def test_what_an_order_would_spoil_is_refused() -> None:
    """Two hosts of 0.4 may land on one GPU, and then leave no room for two of 0.6."""
    assert not always_granted(2, shares("0.4", "0.6", "0.4", "0.6"))
    assert always_granted(2, shares("0.6", "0.6"), shares("0.4", "0.4"))
    assert not always_granted(2, shares("0.4", "0.4"), shares("0.6", "0.6"))


@pytest.mark.parametrize(("hosts", "granted"), [(("0.4", "0.2"), True), (("0.4", "0.3"), False)])
def test_an_engine_and_hosts_share_a_gpu(hosts: tuple[str, ...], granted: bool) -> None:
    assert NodeGpus(1, shares("0.4"), shares(*hosts)).granted is granted
    assert NodeGpus(1, shares("0.4"), late=shares(*hosts)).granted is granted


def test_tenths_add_up_to_a_whole() -> None:
    assert NodeGpus(1, shares("0.1"), shares(*["0.1"] * 9)).granted


def test_hosts_beside_the_engine() -> None:
    gpus = NodeGpus(2, shares("0.4")).with_host(Decimal("0.6"))
    assert gpus.granted and gpus.last_beside_engine
    more = gpus.with_host(Decimal(1))
    assert more.granted and not more.last_beside_engine
    late = NodeGpus(2, shares("0.4"), shares("0.3")).with_host(Decimal("0.3"), late=True)
    assert late.last_beside_engine
    assert not late.with_host(Decimal("0.3"), late=True).last_beside_engine
    assert not NodeGpus(1, hosts=shares("0.3")).last_beside_engine


def test_in_words() -> None:
    gpus = NodeGpus(2, shares("0.4"), shares("0.3", "1"))
    assert str(gpus) == "2 GPUs, of which engines take 0.4 and hosts take 0.3 + 1"
    assert str(NodeGpus(0)) == "0 GPUs"


some_shares = st.lists(st.integers(1, 20).map(lambda part: Decimal(part) / 20), max_size=5).map(tuple)


@given(st.integers(0, 4), some_shares, some_shares, some_shares, st.randoms(use_true_random=False))
def test_what_is_granted_is_granted_in_every_order(
    gpus: int,
    hosts: tuple[Decimal, ...],
    engines: tuple[Decimal, ...],
    late: tuple[Decimal, ...],
    random: Random,
) -> None:
    node = NodeGpus(gpus, engines, hosts, late)
    if not node.granted:
        return
    order = [share for part in (hosts, engines, late) for share in random.sample(part, len(part))]
    taken = [Decimal(0)] * gpus
    for gpu, share in zip(turns(gpus, order), order, strict=True):
        taken[gpu] += share
    assert all(amount <= 1 for amount in taken)


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 20))
def test_equal_shares_fill_gpus(gpus: int, part: int, hosts: int) -> None:
    """As many find room on each GPU as go into it whole: parts of two GPUs are none of one."""
    share = Decimal(part) / 20
    assert always_granted(gpus, (share,) * hosts) is (hosts <= gpus * (20 // part))


@given(st.integers(1, 4), some_shares)
def test_what_is_refused_has_an_order_that_fails(gpus: int, hosts: tuple[Decimal, ...]) -> None:
    def works(order: tuple[Decimal, ...]) -> bool:
        try:
            turns(gpus, order)
        except ValueError:
            return False
        return True

    assert always_granted(gpus, hosts) is all(map(works, permutations(hosts)))
