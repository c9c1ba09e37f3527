"""From a placement table to who is asked for which expert."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.route import NOBODY, owners, route_from_table
from cluster.messages import HostAddress
from cluster.table import PlacementTable

MANIFEST = "cd" * 32


def address(host_id: str) -> HostAddress:
    return HostAddress(host_id, "node", f"x-{host_id}", "", 1)


def table(
    hosts: dict[str, HostAddress | None], experts: dict[int, tuple[tuple[str, ...], ...]]
) -> PlacementTable:
    return PlacementTable(MANIFEST, 7, hosts, experts)


def test_every_expert_has_its_running_replicas_in_the_tables_order() -> None:
    hosts = {"a": None, "b": address("b"), "c": address("c")}
    route = route_from_table(table(hosts, {0: (("a", "c"), ("b",), ("c", "b")), 4: (("a",),)}))
    assert (route.manifest, route.epoch) == (MANIFEST, 7)
    assert route.hosts == (address("b"), address("c"))
    assert route.replicas == {0: ((1,), (0,), (1, 0)), 4: ((),)}
    assert route.replicated
    assert (route.held_by(0), route.held_by(1)) == ((0, (1, 2)), (0, (0, 2)))


def test_owners_prefer_hosts_that_are_asked() -> None:
    replicas = ((0, 1), (1, 2), (2,), (0,), ())
    found = owners(replicas, asked={1}, suspected={0, 2})
    assert found.listed == [1, 1, 2, 0, NOBODY, NOBODY]
    assert found.array.tolist() == found.listed
    assert not found.complete
    assert owners(replicas[:4], {0, 1, 2}, ()).complete


@given(st.data())
def test_every_expert_goes_to_a_host_that_holds_it_if_one_lives(data: st.DataObject) -> None:
    hosts = range(data.draw(st.integers(1, 5)))
    asked = data.draw(st.sets(st.sampled_from(hosts)))
    suspected = data.draw(st.sets(st.sampled_from(hosts))) - asked
    rows = data.draw(st.lists(st.lists(st.sampled_from(hosts), unique=True).map(tuple), max_size=12))
    found = owners(tuple(rows), asked, suspected)
    assert found.listed[-1] == found.array[-1] == NOBODY
    for row, owner in zip(rows, found.listed[:-1], strict=True):
        if asked & set(row):
            assert owner == next(host for host in row if host in asked)
        elif suspected & set(row):
            assert owner == next(host for host in row if host in suspected)
        else:
            assert owner == NOBODY
    assert found.complete == (NOBODY not in found.listed[:-1])
