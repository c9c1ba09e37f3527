"""A folder is complete or absent, whatever happens to its builder, and has one builder at a time."""

from __future__ import annotations

import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from workloads.models import atomic_folder
from workloads.models.atomic_folder import locked, new_folder
from workloads.models.progress import silent


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target, needed_bytes=1) as folder:
        (folder / "a").write_text("1")
        (folder / "a").chmod(0o600)
        assert not target.exists()
    assert names(tmp_path) == ["model"]
    assert (target / "a").read_text() == "1"
    other = tmp_path / "plain"
    other.write_text("")
    assert (target / "a").stat().st_mode == other.stat().st_mode


def test_an_exception_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("")
    with (
        pytest.raises(KeyboardInterrupt),
        new_folder(target, needed_bytes=1, overwrite=True) as folder,
    ):
        (folder / "new").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old"]


def test_a_failing_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("disk on fire")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(CheckpointError, match="disk on fire"),
        new_folder(target, needed_bytes=1, overwrite=True) as folder,
    ):
        (folder / "new").write_text("")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old"]


def test_overwriting_leaves_only_the_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with new_folder(target, needed_bytes=1, overwrite=True) as folder:
            (folder / content).write_text("")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["new"]


def test_leftovers_of_a_crash_are_removed_and_those_of_others_kept(tmp_path: Path) -> None:
    (tmp_path / ".model.partial-dead").mkdir()
    (tmp_path / ".model.partial-dead" / "shard").write_text("half")
    (tmp_path / ".model2.partial-alive").mkdir()
    with new_folder(tmp_path / "model", needed_bytes=1):
        pass
    assert names(tmp_path) == [".model2.partial-alive", "model"]


def test_a_crash_between_the_renames_does_not_lose_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (tmp_path / ".model.replaced-dead" / "model").mkdir(parents=True)
    (tmp_path / ".model.replaced-dead" / "model" / "old").write_text("")
    with (
        pytest.raises(CheckpointError, match="exists already"),
        new_folder(target, needed_bytes=1),
    ):
        pass
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old"]


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", lambda _: usage(10, 9, 999_000_000))
    with (
        pytest.raises(CheckpointError, match=r"1\.0 GB free, the model needs 1\.5 GB"),
        new_folder(tmp_path / "model", needed_bytes=1_500_000_000),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot write the model"),
        locked(tmp_path / "file" / "m", silent),
    ):
        pytest.fail("the block must not run")


def test_one_builder_at_a_time_and_the_other_says_that_it_waits(tmp_path: Path) -> None:
    target = tmp_path / "model"
    events: list[str] = []
    stages: list[str] = []

    def build(name: str) -> None:
        with locked(target, lambda stage, _: stages.append(stage)):
            events.append(f"{name} in")
            time.sleep(0.2)
            events.append(f"{name} out")

    threads = [threading.Thread(target=build, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = events[0][0], events[2][0]
    assert events == [f"{first} in", f"{first} out", f"{second} in", f"{second} out"]
    assert stages == ["waiting for another process that makes this model"]


def test_the_lock_is_dropped_when_the_builder_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "model", silent):
        raise RuntimeError
    with locked(tmp_path / "model", lambda *_: pytest.fail("still locked")):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
