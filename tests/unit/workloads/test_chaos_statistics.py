"""What answers say: gaps, changed tokens, throughput, detection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from workloads.bench import chaos_statistics as statistics
from workloads.bench.chaos_load import Answer, Outcome
from workloads.bench.chaos_result import tables_split
from workloads.bench.chaos_statistics import Gap
from workloads.bench.chaos_watch import (
    HostsSample,
    Sample,
    StatsSample,
    Watcher,
    all_in_use,
    restored_ns,
    up_again_ns,
)

MS = 1_000_000
S = 1_000_000_000


def answer(
    times_ms: list[float],
    tokens: tuple[int, ...] | None = None,
    outcome: Outcome = "ok",
    key: tuple[int, int] = (0, 0),
    ended_ms: float = 0,
) -> Answer:
    times = tuple(int(time * MS) for time in times_ms)
    tokens = tuple(range(len(times))) if tokens is None else tokens
    return Answer(key, 0, int(ended_ms * MS), outcome, "why", tokens, times, (1,) * len(times))


def test_gaps_are_within_streams() -> None:
    found = statistics.gaps([answer([0, 10, 30]), answer([5, 6]), answer([7]), answer([])])
    assert [gap.ms for gap in found] == [10, 20, 1]


def test_a_gap_counts_whole_if_it_overlaps_the_window() -> None:
    gaps = [Gap(0, 10), Gap(10, 20), Gap(20, 500), Gap(500, 510)]
    assert statistics.in_window(gaps, 15, 100) == [Gap(10, 20), Gap(20, 500)]
    assert statistics.in_window(gaps, 15, None) == gaps[1:]
    assert statistics.in_window(gaps, 10, 20) == [Gap(10, 20)]


def test_the_longest_wait_for_a_first_token() -> None:
    answers = [answer([50, 60]), answer([90, 99]), answer([])]  # all sent at 0
    longest = statistics.longest_first_token_ms
    assert [longest(answers, at * MS) for at in (0, 60, 95)] == [90, 90, None]


def test_streams_under_way() -> None:
    answers = [answer([1, 2], ended_ms=3), answer([6, 7], ended_ms=8), answer([], ended_ms=9)]
    assert [statistics.under_way(answers, at * MS) for at in (0, 2, 3, 7)] == [0, 1, 0, 1]


def test_changed_tokens_of_whole_and_of_broken_answers() -> None:
    expected = statistics.reference([answer([0, 1, 2, 3], (5, 6, 7, 8))])
    changed = statistics.changed_tokens
    assert changed([answer([], (5, 6, 7, 8))], expected) == 0
    assert changed([answer([], (5, 6), "broken"), answer([], (), "refused")], expected) == 0
    assert changed([answer([], (5, 9, 9, 8))], expected) == 2
    assert changed([answer([], (5, 6, 7, 8, 9))], expected) == 1


def test_an_answer_may_equal_any_fault_free_one() -> None:
    expected = statistics.reference([answer([], (1, 2)), answer([], (1, 3)), answer([], (4,), key=(1, 0))])
    assert expected.unstable_prompts == 1
    assert statistics.changed_tokens([answer([], (1, 3))], expected) == 0
    assert statistics.changed_tokens([answer([], (4, 3))], expected) == 1


def test_a_reference_with_a_failure_is_none() -> None:
    with pytest.raises(ValueError, match="broken: why"):
        statistics.reference([answer([0, 1]), answer([0], outcome="broken")])


def test_throughput_counts_tokens_by_second() -> None:
    several = Answer((0, 0), 0, 0, "ok", "", (1, 2, 3, 4), (S, int(3.5 * S)), (3, 1))
    assert statistics.throughput([several], 0) == [0, 3, 0, 1]
    assert statistics.throughput([several], S) == [3, 0, 1]
    assert statistics.throughput([], 0) == []


def test_the_longest_gaps_are_plotted_in_order_of_time() -> None:
    gaps = [Gap(0, S), Gap(S, S + MS), Gap(2 * S, 4 * S)]
    assert statistics.plotted_gaps(gaps, 0, most=2) == [(1.0, 1000.0), (4.0, 2000.0)]


def test_outcomes_have_every_key_and_reasons_are_counted() -> None:
    answers = [answer([]), answer([], outcome="event"), answer([], outcome="event")]
    found = statistics.outcomes(answers)
    assert (found["ok"], found["event"], found["refused"]) == (1, 2, 0)
    assert statistics.reasons(answers) == ["2 x event: why"]


def test_detection_is_counted_from_the_fault_before_it() -> None:
    first_after = statistics.first_after
    assert first_after([0, None, 5 * MS], [10 * MS]) is None  # happened before
    assert first_after([12 * MS, 90 * MS], [10 * MS]) == 2  # the first after, not the last
    assert first_after([12 * MS, 107 * MS], [10 * MS, 100 * MS]) == 7  # the slower of the two
    assert first_after([], [1]) is None


def test_the_first_refusal() -> None:
    refused = [answer([], outcome="refused", ended_ms=at) for at in (1, 80, 40)]
    assert statistics.first_refusal_ms([*refused, answer([], ended_ms=20)], 10 * MS) == 30
    assert statistics.first_refusal_ms([answer([], ended_ms=20)], 0) is None


def hosts(at: int, *pids: int | None) -> HostsSample:
    return Sample(at, at + 1, {str(number): pid for number, pid in enumerate(pids)})


def stats(at: int, ejected: int | None) -> StatsSample:
    return Sample(at, at + 1, {} if ejected is None else {"ejected": ejected})


def test_restored_needs_all_hosts_and_the_engine_at_once() -> None:
    told = [hosts(5, 1, 2), hosts(20, 1, None), hosts(30, 1, 3), hosts(50, 1, 3)]
    assert restored_ns(told, [stats(12, 1), stats(40, 0)], 10, frozenset({2})) == 41
    assert restored_ns(told, [stats(12, 0)], 10, frozenset({2})) == 31
    assert restored_ns(told, [stats(12, 1)], 10, frozenset({2})) is None
    # An engine without that counter uses what is ready.
    assert restored_ns(told, [stats(12, None)], 10, frozenset({2})) == 31


def test_what_was_asked_before_the_fault_or_names_the_dead_does_not_count() -> None:
    assert restored_ns([hosts(9, 1, 2)], [stats(12, 0)], 10, frozenset()) is None
    assert restored_ns([hosts(12, 1, 2)], [stats(9, 0)], 10, frozenset()) is None
    assert restored_ns([hosts(12, 1, 2)], [stats(12, 0)], 10, frozenset({2})) is None
    assert restored_ns([Sample(12, 13, None)], [stats(12, 0)], 10, frozenset()) is None


def test_up_again_only_after_it_was_seen_away() -> None:
    away: StatsSample = Sample(20, 21, None)
    assert up_again_ns([stats(5, 0), away, stats(30, 0), stats(40, 0)], 10) == 31
    assert up_again_ns([stats(5, 0), stats(30, 0)], 10) is None
    assert up_again_ns([away], 10) is None
    assert up_again_ns([away, stats(30, 0)], 25) is None


def test_one_order_of_epochs() -> None:
    controller = [(1, "a"), (2, "b"), (2, "b"), (4, "d")]
    assert statistics.split_tables(controller, [(1, "a"), (1, "a"), (4, "d")]) == 0
    assert statistics.split_tables([], []) == 0


def test_a_table_that_goes_back_or_differs_is_split() -> None:
    assert statistics.split_tables([(1, "a"), (2, "b"), (1, "a")], []) == 1
    assert statistics.split_tables([(1, "a"), (2, "b")], [(1, "a"), (2, "c")]) == 1
    # By a restarted controller that had lost its document.
    assert statistics.split_tables([(2, "b"), (1, "a"), (2, "c")], []) == 2


def test_an_engines_tables_are_compared_with_the_controllers() -> None:
    controller = [Sample(1, 1, (1, "a")), Sample(5, 5, None), Sample(6, 6, (2, "b"))]
    engine = [
        Sample(0, 0, {"epoch": 9, "table": "z"}),
        Sample(2, 2, None),
        Sample(7, 7, {"epoch": 2, "table": "c"}),
    ]
    assert tables_split(cast(Watcher, SimpleNamespace(tables=controller, stats=engine)), 1) == 1
    assert tables_split(cast(Watcher, SimpleNamespace(tables=controller, stats=engine[:2])), 1) == 0


def test_whether_every_host_is_in_use_is_what_was_said_last() -> None:
    assert all_in_use([]) and all_in_use([stats(1, None)])
    assert not all_in_use([stats(1, 0), stats(2, 1)])
    # Nobody answered: what was said before counts.
    assert not all_in_use([stats(1, 1), Sample(2, 3, None)])
    assert all_in_use([stats(1, 1), stats(2, 0), Sample(3, 4, None)])
