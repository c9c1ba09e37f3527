"""Rows are the same whenever and by however many they are read, and leave no new sample out."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.training_rows import Rows, RowSettings, part_of
from cluster.errors import LearningError

NEW = [list(range(start, start + 3 + start % 4)) for start in range(0, 90, 10)]
OLD = {"law": [[1000, 1001, 1002]], "code": [list(range(2000, 2040)), [2100]]}


def test_rows_depend_on_the_step_and_the_seed_alone() -> None:
    settings = RowSettings(rows=8, length=5, seed=3)
    forward = Rows(NEW, OLD, settings)
    steps = [forward.of_step(step) for step in range(12)]
    again = Rows(NEW, OLD, settings)
    for step in reversed(range(12)):
        assert again.of_step(step).equal(steps[step]), step
    other = Rows(NEW, OLD, RowSettings(rows=8, length=5, seed=4))
    assert not other.of_step(0).equal(steps[0])
    assert all(tuple(rows.shape) == (8, 5) for rows in steps)


def test_every_new_token_comes_once_a_lap_and_the_rest_is_known() -> None:
    settings = RowSettings(rows=4, length=3, replay=0.25)
    rows = Rows(NEW, OLD, settings)
    count = sum(map(len, NEW))
    steps = [rows.of_step(step) for step in range(count)]
    fresh = list(chain.from_iterable(row.tolist() for step in steps for row in step[:3]))
    for lap in range(3):
        assert sorted(fresh[lap * count : (lap + 1) * count]) == sorted(chain.from_iterable(NEW))
    known = [row.tolist() for step in steps for row in step[3:]]
    assert all(token >= 1000 for row in known for token in row)
    drawn = [domain for step in range(1000) for domain in rows.domains(step)]
    assert 0.45 < drawn.count("law") / 1000 < 0.55, "domains are even, whatever is in them"
    assert len({row[0] for row in known}) > 5, "long texts are read from anywhere"


def test_domains_are_replayed_by_their_weights() -> None:
    rows = Rows(NEW, OLD, RowSettings(rows=8, length=5, replay=0.5))
    assert rows.known == ("code", "law")
    drawn = [domain for step in range(100) for domain in rows.domains(step, (0.9, 0.1))]
    assert len(drawn) == 400 and 0.8 < drawn.count("code") / 400 < 0.97
    for step in range(10):
        of = [row[0] < 2000 for row in rows.of_step(step, (0.9, 0.1))[4:].tolist()]
        assert of == [domain == "law" for domain in rows.domains(step, (0.9, 0.1))], "a row is of one domain"
    assert rows.domains(3, (0.0, 1.0)) == ["law"] * 4
    assert Rows(NEW, OLD, RowSettings(replay=0.0)).domains(0) == []


@given(st.integers(1, 40), st.integers(1, 9))
def test_workers_share_rows_evenly(rows: int, workers: int) -> None:
    parts = [part_of(rows, rank, workers) for rank in range(workers)]
    assert list(chain.from_iterable(parts)) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_how_many_rows_are_of_what_is_known() -> None:
    found = [
        RowSettings(rows=rows, replay=replay).replayed for rows, replay in ((8, 0.25), (8, 0.01), (2, 0.9))
    ]
    assert found == [2, 1, 1] and RowSettings(replay=0.0).replayed == 0


def test_nothing_to_make_rows_of_is_told() -> None:
    with pytest.raises(LearningError, match="have no tokens"):
        Rows([[]], OLD, RowSettings())
    with pytest.raises(LearningError, match="nothing that is known"):
        Rows(NEW, {"law": [[]]}, RowSettings())
    assert Rows(NEW, {}, RowSettings(rows=2, length=4, replay=0.0)).of_step(0).shape == (2, 4)
