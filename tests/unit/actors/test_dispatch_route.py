"""From a placement table to the arrays of one step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.dispatch import route_from_table
from cluster.errors import HostError
from cluster.messages import HostAddress
from cluster.table import PlacementTable

MANIFEST = "cd" * 32


def address(host_id: str) -> HostAddress:
    return HostAddress(host_id, "node", f"x-{host_id}", "", 1)


def table(
    hosts: dict[str, HostAddress | None], experts: dict[int, tuple[tuple[str, ...], ...]]
) -> PlacementTable:
    return PlacementTable(MANIFEST, 7, hosts, experts)


def test_each_expert_goes_to_the_first_of_its_hosts() -> None:
    hosts = {"a": address("a"), "b": address("b")}
    route = route_from_table(table(hosts, {0: (("a", "b"), ("b", "a"), ("b",)), 4: (("a",),)}))
    assert (route.manifest, route.epoch) == (MANIFEST, 7)
    assert route.hosts == (address("a"), address("b"))
    assert {layer: row.tolist() for layer, row in route.host_of.items()} == {0: [0, 1, 1], 4: [0]}
    assert all(row.dtype == np.int16 for row in route.host_of.values())


def test_a_copy_answers_for_a_host_that_does_not_run() -> None:
    hosts = {"a": None, "b": address("b"), "c": address("c")}
    route = route_from_table(table(hosts, {0: (("a", "c"), ("b",), ("c", "a"))}))
    assert route.hosts == (address("b"), address("c"))
    assert route.host_of[0].tolist() == [1, 0, 1]


def test_experts_without_a_running_host_are_counted_and_the_first_is_named() -> None:
    hosts = {"a": None, "b": address("b")}
    with pytest.raises(HostError, match=r"2 experts.*layer 3, expert 1") as error:
        route_from_table(table(hosts, {1: (("b",),), 3: (("b", "a"), ("a",), ("a",))}))
    assert "expertmesh status" in error.value.hint


@given(st.data())
def test_every_expert_goes_to_a_running_host_that_holds_it(data: st.DataObject) -> None:
    names = [f"h{i}" for i in range(data.draw(st.integers(1, 5)))]
    running = data.draw(st.sets(st.sampled_from(names), min_size=1))
    hosts = {name: address(name) if name in running else None for name in names}
    holders = st.lists(st.sampled_from(names), min_size=1, unique=True)
    rows = data.draw(st.lists(holders, min_size=1, max_size=12))
    made = table(hosts, {5: tuple(map(tuple, rows))})
    if all(running & set(row) for row in rows):
        route = route_from_table(made)
        for row, position in zip(rows, route.host_of[5], strict=True):
            chosen = route.hosts[position].host_id
            assert chosen == next(name for name in row if name in running)
    else:
        with pytest.raises(HostError):
            route_from_table(made)
