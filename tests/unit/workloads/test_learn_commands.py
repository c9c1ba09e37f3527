"""`expertmesh learn ...` over a stream in a folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.learning.records import Record, owner
from cluster.learning.stream import Stream
from cluster.learning.text_files import pieces
from workloads import cli

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in os.environ:
        if name.startswith(("EXPERTMESH", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "expertmesh.yaml").write_text("learning: {stream: kept, holdout: 0.5}\n")

    def call(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["expertmesh", "learn", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return " ".join((said.err if code else said.out).split())

    return call


def test_texts_are_ingested_told_of_and_forgotten(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "texts"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "a.txt").write_text("not this")
    (folder / "a.txt").write_text("first text\n")
    (folder / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third"}\n')
    (folder / "image.png").write_bytes(b"\xff\xfe")
    pq.write_table(pa.table({"text": ["fourth", None], "more": [1, 2]}), folder / "c.parquet")
    made = json.loads(run("ingest", str(folder), "--domain", "law", "--shard-records", "3", "--json"))
    assert (made["files"], made["records"], made["shards"]) == (3, 4, [1, 2])
    stream = Stream(str(tmp_path / "kept"))
    found = [record for _, shard in stream.after(0) for record in shard]
    assert [record.answer for record in found] == ["first text", "second", "third", "fourth"]
    assert {(record.kind, record.domain, record.consent) for record in found} == {("text", "law", "operator")}

    mine = owner("my key")
    stream.append([Record("request", "r", 5.0, mine, "traffic", answer="a")])
    state = json.loads(run("stream", "--json"))
    assert (state["shards"], state["last"], state["owners"], state["oldest"]) == (3, 3, 1, 5.0)
    assert state["records"] == {"law": {"text": 4}, "traffic": {"request": 1}} and 0 < state["held_out"] < 5
    assert "3 shards" in run("stream") and "law" in run("stream")
    assert "1 records taken out" in run("forget", "--key", "my key")
    assert "0 shards taken out" in run("expire")
    assert json.loads(run("stream", "--json"))["records"] == {"law": {"text": 4}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file or folder"),
        ({}, "no text files in"),
        ({"a.txt": b"\xff\xfe\xfa"}, "a.txt can't be read"),
        ({"a.jsonl": b'{"text": 1}'}, "a.jsonl:1: text is no text"),
        ({"a.jsonl": b'{"text": "a"}\n{'}, "a.jsonl:2 is no JSON object with a text"),
        ({"a.parquet": b"PAR1"}, "a.parquet can't be read"),
        ({"a.txt": b" \n"}, "1 files hold no text"),
        ({"a.txt": b"good", "b.txt": b"\xff"}, "b.txt can't be read"),
    ],
)
def test_what_can_not_be_ingested_leaves_the_stream_as_it_was(
    tmp_path: Path, run: Run, content: dict[str, bytes] | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "texts").mkdir()
        for name, data in content.items():
            (tmp_path / "texts" / name).write_bytes(data)
    said = run("ingest", "texts", "--domain", "law", code=1)
    assert words in said and said.count("error:") == 1
    assert not list((tmp_path / "kept").rglob("*.*")) and Stream(str(tmp_path / "kept")).last() == 0
    assert "has no name" in run("ingest", "texts", "--domain", " ", code=1)
    assert "the key is empty" in run("forget", "--key", " ", code=1)


@given(st.text("ab \n", max_size=200), st.integers(1, 30))
def test_pieces_are_the_text(text: str, longest: int) -> None:
    found = list(pieces(text, longest))
    assert all(0 < len(piece) <= longest and piece == piece.strip() for piece in found)
    assert "".join("".join(found).split()) == "".join(text.split())


def test_pieces_end_with_paragraphs_where_they_can() -> None:
    text = "one one\n\ntwo two\n\nthree three"
    assert list(pieces(text, 20)) == ["one one\n\ntwo two", "three three"]
    assert list(pieces("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]
