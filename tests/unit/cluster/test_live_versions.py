"""Numbers of experts: shared between versions, never given twice, and all of them where their expert is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import VersionError
from cluster.live_versions import (
    LiveVersions,
    Variant,
    arms,
    assigned,
    dead_numbers,
    live_numbers,
    new_numbers,
    numbers,
    same_but_choice,
    same_engine,
    serving,
    share_of,
    variants_of,
    with_shares,
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


def test_a_version_may_add_experts_beside_others_and_retire_some() -> None:
    # Expert 4 is a copy of 1, expert 5 lives beside 2 and has a content of its own.
    grown = with_version(BASE, "grown", {0: {5: "a"}}, SIZES, {"gate": "g"}, {0: {4: 1, 5: 2}}, {0: (0, 1)})
    assert grown.live["grown"] == {0: {4: 1, 5: 4}}
    assert [live_numbers(grown, 0, expert) for expert in range(4)] == [[0], [1], [2, 4], [3]]
    assert new_numbers(BASE, grown, SIZES) == {0: (4,)}, "a copy takes no memory"
    assert numbers(grown, {0: (0, 1, 2), 2: (0,)}) == {0: (0, 1, 2, 4), 2: (0,)}
    assert not same_engine(grown, "base", "grown") and same_engine(grown, "grown", "grown")
    alone = without_version(serving(grown, "grown"), "base")
    assert numbers(alone, {0: (0, 1, 2, 3)}) == {0: (1, 2, 3, 4)} and dead_numbers(alone, 0, 4) == {0}
    assert not alone.plain and without_version(grown, "grown") == replace(BASE, variants=grown.variants)


blobs = st.dictionaries(st.integers(0, 2), st.sampled_from("abc"), max_size=3)
added = st.sampled_from([{}, {4: 0}, {4: 2, 5: 2}])
retired = st.sampled_from([(), (0,), (3,)])
change = st.tuples(blobs, added, st.dictionaries(st.integers(4, 5), st.sampled_from("abc")), retired)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), change), max_size=12))
def test_a_number_is_one_content_for_ever(steps: list[tuple[bool, int, Any]]) -> None:
    versions, seen = BASE, {}
    contents: dict[str, Any] = {"base": ({}, {}, ())}
    for add, which, (own, more, of_more, gone) in steps:
        name = f"v{which}"
        if add and name not in versions.live:
            experts = {**own, **{expert: blob for expert, blob in of_more.items() if expert in more}}
            versions = with_version(
                versions,
                name,
                {0: experts},
                SIZES,
                added={0: more} if more else None,
                retired={0: gone} if gone else None,
            )
            contents[name] = experts, more, gone
        elif not add and name in versions.live:
            versions = without_version(versions, name)
        for live, differs in versions.live.items():
            experts, more, gone = contents[live]
            for expert in {*range(4), *more} - {*gone}:
                number = differs.get(0, {}).get(expert, expert)
                home = more.get(expert, expert)
                assert seen.setdefault(number, (home, experts.get(expert))) == (home, experts.get(expert))
                assert number in live_numbers(versions, 0, home)
        held = numbers(versions, {0: (0, 1, 2, 3)})[0]
        assert not dead_numbers(versions, 0, 4).intersection(held)
    table = PlacementTable("m", 3, {}, {}, versions=versions)
    assert PlacementTable.from_json(table.to_json()) == table


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), st.floats(0.0, 1.0, exclude_max=True))
def test_a_lot_gives_every_version_its_share(weights: list[float], lot: float) -> None:
    names = [f"v{number}" for number in range(len(weights))]
    of = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
    versions = with_shares(replace(BASE, live={name: {} for name in names}), {"chat": of, "": {"v0": 1.0}})
    name, propensity = assigned(versions, "chat", lot)
    assert propensity == of[name] and assigned(versions, "unheard of", lot) == ("v0", 1.0)
    ends = [sum(list(of.values())[: number + 1]) for number in range(len(names))]
    if all(abs(lot - end) > 1e-9 for end in ends):
        assert name == names[sum(lot > end for end in ends)]
    assert arms(versions) == tuple(names)
    assert sum(share_of(versions, one) for one in names) == pytest.approx(1.0)


def test_versions_that_share_requests_stay_until_another_serves() -> None:
    both = with_version(BASE, "one", {0: {1: "a"}}, SIZES)
    shared = with_shares(both, {"": {"base": 0.5, "one": 0.5}})
    assert same_but_choice(both, shared)
    with pytest.raises(AssertionError):
        without_version(shared, "one")
    assert serving(shared, "one").shares == {} and with_shares(shared, {}) == both
    table = PlacementTable("m", 1, {}, {}, versions=shared)
    assert PlacementTable.from_json(table.to_json()).versions == shared
