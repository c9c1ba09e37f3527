"""Numbers of experts: shared between versions, never given twice, and all of them where their expert is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import VersionError
from cluster.live_versions import (
    LiveVersions,
    Variant,
    dead_numbers,
    live_numbers,
    new_numbers,
    numbers,
    serving,
    variants_of,
    with_version,
    without_version,
)
from cluster.table import PlacementTable

SIZES = {0: 4, 2: 3}
BASE = LiveVersions("base", {"base": {}})


def test_an_expert_of_its_own_gets_the_next_number() -> None:
    one = with_version(BASE, "one", {0: {1: "a"}, 2: {0: "b"}}, SIZES)
    two = with_version(one, "two", {0: {1: "c", 3: "d"}, 2: {0: "b"}}, SIZES)
    assert one.live["one"] == {0: {1: 4}, 2: {0: 3}} and two.live["two"] == {0: {1: 5, 3: 6}, 2: {0: 3}}
    assert (
        live_numbers(two, 0, 1) == [1, 4, 5]
        and live_numbers(two, 0, 0) == [0]
        and live_numbers(two, 2, 0) == [0, 3]
    )
    assert numbers(two, {0: (1, 2), 2: (0,)}) == {0: (1, 2, 4, 5), 2: (0, 3)}
    assert variants_of(two, {0: (1, 4, 5), 2: (1,)}, SIZES) == {0: {4: Variant(1, "a"), 5: Variant(1, "c")}}
    assert new_numbers(one, two, SIZES) == {0: (5, 6)} and new_numbers(two, one, SIZES) == {}


def test_what_is_let_go_keeps_its_number() -> None:
    one = with_version(BASE, "one", {0: {1: "a"}}, SIZES)
    gone = without_version(one, "one")
    assert (
        live_numbers(gone, 0, 1) == [1]
        and dead_numbers(gone, 0, 4) == {4}
        and dead_numbers(gone, 2, 3) == set()
    )
    assert with_version(gone, "other", {0: {1: "b"}}, SIZES).live["other"] == {0: {1: 5}}
    again = with_version(gone, "again", {0: {1: "a"}}, SIZES)
    assert again.live["again"] == {0: {1: 4}}, "the same content has the same number"


def test_the_base_is_let_go_as_any_other() -> None:
    one = serving(with_version(BASE, "one", {0: {1: "a"}}, SIZES), "one")
    alone = without_version(one, "base")
    assert numbers(alone, {0: (0, 1)}) == {0: (0, 4)} and dead_numbers(alone, 0, 4) == {1}


def test_running_requests_may_go_on_with_the_version_that_serves() -> None:
    one = with_version(BASE, "one", {0: {1: "a"}}, SIZES)
    assert serving(one, "one").continued == {}
    moved = serving(one, "one", continue_running=True)
    assert moved.serving == "one" and moved.continued == {"base": "one"}
    assert serving(moved, "base").continued == {}, "and requests of the base are its own again"


@pytest.mark.parametrize("experts", [{0: {4: "a"}}, {0: {-1: "a"}}, {1: {0: "a"}}])
def test_an_expert_that_the_model_lacks_is_refused(experts: dict[int, dict[int, str]]) -> None:
    with pytest.raises(VersionError, match="which the model does not have"):
        with_version(BASE, "one", experts, SIZES)


blobs = st.dictionaries(st.integers(0, 2), st.sampled_from("abc"), max_size=3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), blobs), max_size=12))
def test_a_number_is_one_content_for_ever(steps: list[tuple[bool, int, dict[int, str]]]) -> None:
    versions, seen = BASE, {}
    contents: dict[str, dict[int, str]] = {"base": {}}
    for add, which, experts in steps:
        name = f"v{which}"
        if add and name not in versions.live:
            versions, contents[name] = with_version(versions, name, {0: experts}, SIZES), experts
        elif not add and name in versions.live:
            versions = without_version(versions, name)
        for live, differs in versions.live.items():
            for expert in range(4):
                number = differs.get(0, {}).get(expert, expert)
                content = expert, contents[live].get(expert, "base")
                assert seen.setdefault(number, content) == content
                assert number in live_numbers(versions, 0, expert)
        held = numbers(versions, {0: (0, 1, 2, 3)})[0]
        assert not dead_numbers(versions, 0, 4).intersection(held)
    table = PlacementTable("m", 3, {}, {}, versions=versions)
    assert PlacementTable.from_json(table.to_json()) == table
