"""What counts of a run's answers: tokens of all, times of those under load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workloads.bench.chaos_load import Answer
from workloads.bench.chaos_plan import Planned
from workloads.bench.chaos_result import Run, Struck, summary
from workloads.bench.chaos_scenario import Scenario
from workloads.bench.chaos_statistics import reference

MS = 1_000_000
SCENARIO = Scenario.model_validate(
    {"name": "kill-host", "description": "d", "events": [{"action": "kill", "host": "any", "at": 3}]}
)
WATCHER: Any = SimpleNamespace(stats=[], hosts=[], tables=[])


def answer(begin_ms: int, gaps_ms: list[int], tokens: list[int], outcome: Any = "ok") -> Answer:
    times = [begin_ms * MS]
    for gap in gaps_ms:
        times.append(times[-1] + gap * MS)
    return Answer(
        (0, 0), begin_ms * MS, times[-1], outcome, "", tuple(tokens), tuple(times), (1,) * len(times)
    )


def judged(answers: list[Answer], again: list[Answer]) -> Run:
    struck = [Struck(Planned(3.0, "kill", "local-0", None, None, None), 3000 * MS)]
    expected = reference([answer(0, [10, 10], [1, 2, 3])])
    return summary(SCENARIO, 0, 0, struck, answers, again, expected, WATCHER, 9000 * MS, ({}, {}))


def test_gaps_are_of_the_load_and_tokens_of_all() -> None:
    loaded = answer(2995, [10, 40], [1, 2, 3])
    run = judged([loaded], [answer(9000, [800, 10], [1, 2, 4])])
    assert run.longest_gap_ms == pytest.approx(40) and run.added_gap_ms == pytest.approx(30)
    assert run.changed_tokens == 1 and run.outcomes["ok"] == 2
    assert sum(run.throughput) == 3


def test_an_answer_that_fails_after_recovery_is_an_error() -> None:
    run = judged([answer(2995, [10, 40], [1, 2, 3])], [answer(9000, [], [1], "broken")])
    assert run.errors == 1 and run.longest_gap_ms == pytest.approx(40)
