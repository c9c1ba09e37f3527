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

from cluster.learning.journal import Journal, LoopState, begun, ended, known
from cluster.learning.records import Record, owner
from cluster.learning.split import holdout_of
from cluster.learning.stream import Stream
from cluster.learning.text_files import pieces
from cluster.versions.files import Files
from workloads import cli
from workloads.learn_status import Teller

Run = Callable[..., str]
BITS = {"bits_per_byte.law.before": 2.0, "bits_per_byte.law.after": 2.5}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in os.environ:
        if name.startswith(("EXPERTMESH", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "expertmesh.yaml").write_text("learning: {stream: kept, state: state, holdout: 0.5}\n")

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
    said = run("forget", "--key", "my key")
    assert "1 records taken out" in said and "0 samples out of what is replayed" in said
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


def test_the_status_of_a_loop(tmp_path: Path, run: Run) -> None:
    assert "nothing was learnt yet" in run("status")
    stream = Stream(str(tmp_path / "kept"))
    texts = [f"text {number}" for number in range(40)]
    stream.append([Record("text", t, 5.0, domain="law", answer=t) for t in texts])
    files = Files(str(tmp_path / "state"))
    journal = Journal(files)
    state = begun(LoopState(), "law", 1, parent="p", seed=0, parts=2, now=60.0)
    done = ended(state, "refused", 120.0, reasons=("it is worse",), metrics=BITS)
    stream.append([Record("text", "new", 5.0, domain="law", answer=texts[0]) for _ in range(3)])
    reservoir = journal.replayed(journal.load(), 9)
    reservoir.add([Record("text", "old", 5.0, domain="code", answer="old")])
    state = known(done, "code", 1, journal.keep(reservoir))
    journal.save(begun(state, "art", 2, parent="p", seed=0, parts=2, now=180.0))
    Teller(files)("training", 0.25, {"maths": "too few"})
    shown = run("status")
    for words in (
        "round 2: art, gathering",
        "training 25%",
        "maths waits: too few",
        "it is worse",
        "2.0000 → 2.5000",
    ):
        assert words in shown, shown
    found = json.loads(run("status", "--json"))
    assert found["replayed"] == {"code": 1} and found["offsets"] == {"law": 1, "code": 1}
    assert found["round"]["domain"] == "art" and found["rounds"][0]["phase"] == "refused"
    assert found["doing"]["what"] == "training"
    held = holdout_of(texts[0], 0.5, 1) is not None
    assert ("law" in found["waiting"]) == (not held)


def test_a_damaged_stream_or_journal_is_told(tmp_path: Path, run: Run) -> None:
    (tmp_path / "kept" / "shards").mkdir(parents=True)
    (tmp_path / "kept" / "shards" / "000000000001").write_bytes(b"torn")
    assert "is no shard of the stream" in run("status", code=1)
    assert "is no shard of the stream" in run("run", "--domain", "law", code=1)
    (tmp_path / "kept" / "shards" / "000000000001").unlink()
    assert "holds nothing to learn from" in run("run", "--domain", "law", code=1)
    (tmp_path / "state" / "journal").mkdir(parents=True)
    (tmp_path / "state" / "journal" / "000000000001").write_bytes(b"{")
    assert "makes no sense" in run("status", code=1)


def test_without_a_bandit_it_says_how_one_begins(tmp_path: Path, run: Run) -> None:
    assert run("bandit", "--dry-run") == "no versions share requests"
    told = json.loads(run("bandit", "--dry-run", "--json"))
    assert told["under_way"] is False and told["report"] is None
    assert "set learning.capture" in run("bandit", "--arm", "4f1c", code=1)
    assert "exclude each other" in run("bandit", "--arm", "4f1c", "--end", code=2)
    assert "error" in run("bandit", "--end", code=1)


def test_drift_is_told_before_anything_was_learnt(tmp_path: Path, run: Run) -> None:
    assert json.loads(run("status", "--json"))["drift"] == {"trouble": "", "domains": {}}
    Files(str(tmp_path / "state")).renew("drift", b"{")
    assert "makes no sense" in run("status", code=1)
