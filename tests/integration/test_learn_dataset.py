"""Datasets that Ray Data reads into the stream."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import LearningError, VersionError
from cluster.learning.records import Record
from cluster.learning.sources import records_of_file
from cluster.learning.text_files import LONGEST
from workloads.learn_dataset import dataset_files, read_dataset, shards_of

pytestmark = pytest.mark.slow

LONG = "\n\n".join(f"paragraph {number} " + "word " * 200 for number in range(20))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.txt").write_text("not this")
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / "a.txt").write_text(LONG)
    (folder / "b.jsonl").write_text('{"text": "second", "more": 1}\n{"text": "third"}\n')
    for number in range(3):
        texts = [f"text {number} {row}" for row in range(50)] + [None]
        pq.write_table(pa.table({"text": texts, "more": range(51)}), folder / "deep" / f"{number}.parquet")
    return folder


def shards(url: str, column: str = "text", shard_records: int = 64) -> list[list[Record]]:
    read = read_dataset(dataset_files(url, {}), {}, column)
    return list(shards_of(read, domain="law", consent="mine", at=1.0, shard_records=shard_records))


def test_what_is_read_is_what_files_hold(ray_cluster: str, folder: Path) -> None:
    assert dataset_files(str(folder), {}).count == 5
    found = shards(str(folder))
    assert [len(shard) for shard in found[:-1]] == [64] * (len(found) - 1) and len(found) > 2
    records = [record for shard in found for record in shard]
    files = [folder / "a.txt", folder / "b.jsonl", *sorted((folder / "deep").iterdir())]
    wanted = [record for file in files for record in records_of_file(file, "law", "mine", 1.0)]
    assert sorted(records, key=lambda r: r.id) == sorted(wanted, key=lambda r: r.id)
    assert max(len(record.answer) for record in records) <= LONGEST < len(LONG)
    # By URL, one file, of another column.
    pq.write_table(pa.table({"body": ["one", "two"]}), folder / "other.parquet")
    (one,) = shards(f"file://{folder}/other.parquet", column="body")
    assert [record.answer for record in one] == ["one", "two"]


def test_what_can_not_be_read_is_told_once(ray_cluster: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LearningError, match="no text files in"):
        dataset_files(str(tmp_path / "nowhere"), {})
    with pytest.raises(VersionError, match="can't be opened"):
        dataset_files("nonsense://bucket/texts", {})
    with pytest.raises(LearningError, match="can't be read as a dataset") as told:
        shards(str(folder / "deep"), column="body")
    assert "--column" in str(told.value.hint) and "body" in told.value.message
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(LearningError, match=r"can't be read as a dataset: .*utf-8"):
        shards(str(folder / "bad.txt"))
