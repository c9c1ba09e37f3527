"""`bench solver`: both solve the same layer, and neither beats a proved optimum."""

from __future__ import annotations

import json

import pytest

from workloads.bench.solver import compare, measure


@pytest.mark.parametrize("seed", range(2))
def test_the_search_is_never_better_than_what_is_proved(seed: int) -> None:
    case = compare(6, 3, seed, 20.0)
    assert case.optimal and case.highs_bound <= case.ours * (1 + 1e-3)
    assert case.ours <= 1.1 * case.highs


def test_the_report_is_json_and_has_its_bar() -> None:
    told: list[str] = []
    report = measure(1, 20.0, told.append, sizes=((5, 2),))
    assert json.loads(json.dumps(report)) == report and len(told) == len(report["cases"]) == 1
    bar = report["bars"]["ours_over_optimum_at_most"]
    assert bar["value"] == pytest.approx(report["cases"][0]["ours"] / report["cases"][0]["highs"])
