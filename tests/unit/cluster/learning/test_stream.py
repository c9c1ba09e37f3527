"""The stream: written once and in order by many, read once, and what is forgotten is gone."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LearningError, VersionError
from cluster.learning.records import Record, from_parquet, owner, to_parquet, with_feedback
from cluster.learning.stream import Stream

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
records = st.builds(
    Record,
    kind=st.sampled_from(["request", "text", "feedback"]),
    id=text,
    at=st.floats(0, 2e9),
    key=text,
    domain=text,
    manifest=text,
    consent=text,
    prompt=text,
    answer=text,
    score=st.none() | st.floats(0, 1),
    context=text,
    propensity=st.none() | st.floats(0, 1),
)


def said(number: int, **more: object) -> Record:
    return Record("request", f"cmpl-{number}", 1000.0 + number, answer=f"answer {number}", **more)  # type: ignore[arg-type]


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream(str(tmp_path / "stream"))


@given(st.lists(records, max_size=5))
def test_records_come_back_as_they_were(given: list[Record]) -> None:
    assert from_parquet(to_parquet(given), "it") == given


def test_shards_from_before_propensities_are_read() -> None:
    old = BytesIO()
    given = [said(1, score=0.5), said(2)]
    table = pq.read_table(BytesIO(to_parquet(given))).drop_columns(["context", "propensity"])
    pq.write_table(table, old)
    assert from_parquet(old.getvalue(), "it") == given
    damaged = BytesIO()
    pq.write_table(table.drop_columns(["prompt"]), damaged)
    with pytest.raises(LearningError, match="is no shard of the stream"):
        from_parquet(damaged.getvalue(), "it")


def test_what_is_no_shard_is_told_of() -> None:
    good = to_parquet([said(1)])
    for damaged in (b"", good[:-9], b"PAR1" + good[9:]):
        with pytest.raises(LearningError, match="shard 7 is no shard of the stream"):
            from_parquet(damaged, "shard 7")
    odd = to_parquet([Record("other", "a", 1.0)])  # type: ignore[arg-type]
    with pytest.raises(LearningError, match="unknown kind: other"):
        from_parquet(odd, "shard 7")


def test_shards_are_read_once_in_their_order(stream: Stream, tmp_path: Path) -> None:
    assert stream.last() == 0 and list(stream.after(0)) == []
    assert [stream.append([said(n)]) for n in (1, 2, 3)] == [1, 2, 3]
    assert [number for number, _ in stream.after(1)] == [2, 3]
    assert stream.read(2) == [said(2)]
    file = tmp_path / "stream" / "shards" / "000000000002"
    assert pq.read_table(file).column("answer").to_pylist() == ["answer 2"], (
        "as any reader of Parquet sees it"
    )
    with pytest.raises(LearningError, match="a shard of no records"):
        stream.append([])
    with pytest.raises(VersionError):
        stream.read(9)


def test_many_write_and_nothing_is_lost_or_there_twice(stream: Stream) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 5):
            stream.append([said(number)])

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 40, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.numbers() == list(range(1, 41))
    found = sorted(record.id for _, shard in stream.after(0) for record in shard)
    assert found == sorted(said(number).id for number in range(40))


def test_who_is_forgotten_is_gone_with_all_that_was_said_of_them(stream: Stream) -> None:
    mine, other = owner("mine"), owner("other")
    assert mine != other and "mine" not in mine
    stream.append([said(1, key=mine), said(2, key=other)])
    stream.append([said(3, key=mine)])
    stream.append(
        [Record("feedback", "cmpl-1", 5.0, key=other, score=1.0), Record("feedback", "cmpl-2", 5.0)]
    )
    assert stream.forget(mine) == 3 and stream.forget(mine) == 0
    assert [(n, [record.id for record in shard]) for n, shard in stream.after(0)] == [
        (1, ["cmpl-2"]),
        (2, []),
        (3, ["cmpl-2"]),
    ]
    assert stream.append([said(4)]) == 4


def test_what_is_too_old_goes_and_its_numbers_are_not_given_again(stream: Stream) -> None:
    for number in (1, 2, 3):
        stream.append([said(number)])
    assert stream.expire(1002.5) == 2 and stream.numbers() == [3]
    assert stream.expire(9e9) == 0 and stream.append([said(4)]) == 4


def test_the_last_that_was_said_of_an_answer_counts() -> None:
    feedback = [Record("feedback", "cmpl-1", at, score=score) for at, score in ((1.0, 0.0), (2.0, 1.0))]
    found = with_feedback([said(1), said(2), *feedback, Record("feedback", "cmpl-9", 3.0, score=0.0)])
    assert [(record.id, record.score) for record in found] == [("cmpl-1", 1.0), ("cmpl-2", None)]
