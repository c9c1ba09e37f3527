"""The envelope that every measurement writes."""

from __future__ import annotations

import json
import random
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from workloads.bench.report import Bar, envelope, now, quantiles, write

numbers = st.floats(-1e9, 1e9)


@given(st.lists(numbers, min_size=1), st.randoms())
def test_quantiles_are_ordered_within_the_series_and_blind_to_its_order(
    series: list[float], order: random.Random
) -> None:
    found = quantiles(series)
    assert found.n == len(series)
    slack = 1e-6 * max(abs(min(series)), abs(max(series)))
    in_order = [min(series), found.p50, found.p90, found.p99, max(series)]
    assert all(low <= high + slack for low, high in pairwise(in_order))
    shuffled = list(series)
    order.shuffle(shuffled)
    assert quantiles(shuffled) == found


def test_quantiles_of_a_known_series() -> None:
    found = quantiles(range(101))
    assert (found.n, found.p50, found.p90, found.p99) == (101, 50.0, 90.0, 99.0)


def test_an_empty_series_has_no_quantiles() -> None:
    with pytest.raises(ValueError, match="empty"):
        quantiles([])


@given(numbers, numbers)
def test_a_bar_is_met_on_its_own_side(value: float, limit: float) -> None:
    most, least = Bar("k", value, limit, True), Bar("k", value, limit, False)
    assert most.met == (value <= limit)
    assert least.met == (value >= limit)
    assert most.met or least.met
    assert most.line().startswith("met" if most.met else "missed")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    bar = Bar("ratio", None, 2, True)
    assert bar.met is None
    assert bar.line() == "not measured  ratio ≤ 2"


@given(
    st.dictionaries(st.text(min_size=1), st.lists(numbers, min_size=1), max_size=3),
    st.dictionaries(st.text(min_size=1), st.none() | numbers, max_size=3),
    st.integers(0, 2**32),
)
def test_the_envelope_survives_json(
    series: dict[str, list[float]], values: dict[str, float | None], seed: int
) -> None:
    bars = [Bar(key, value, 2.0, True) for key, value in values.items()]
    report = envelope("bench x", seed=seed, started_at=now(), series=series, bars=bars, results=[1])
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report
    assert (again["command"], again["seed"], again["results"]) == ("bench x", seed, [1])
    assert {"python", "torch", "numpy", "ray", "vllm", "expertmesh"} == set(again["versions"])
    assert again["cores"] >= 1 and again["cpu_model"]
    assert datetime.fromisoformat(again["started_at"]).tzinfo is not None
    assert set(again["series"]) == set(series) and set(again["bars"]) == set(values)
    for key, bar in again["bars"].items():
        value = values[key]
        assert bar["met"] is (None if value is None else value <= 2.0)


def test_write_to_a_file_and_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"a": [1, None]}, str(tmp_path / "r.json"))
    write({"a": [1, None]}, "-")
    assert (
        json.loads((tmp_path / "r.json").read_text())
        == json.loads(capsys.readouterr().out)
        == {"a": [1, None]}
    )


def test_a_folder_that_does_not_exist_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        write({}, str(tmp_path / "missing" / "r.json"))
