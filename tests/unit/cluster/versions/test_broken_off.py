"""Publishers that end in the middle: killed at every step, and on a disk that is full."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.checkpoint import Checkpoint
from cluster.errors import VersionError
from cluster.versions import failpoints
from cluster.versions.aliases import Move
from cluster.versions.collect import collect
from cluster.versions.publish import publish
from cluster.versions.store import Store
from tests.small_disk import small_disk
from tests.unit.cluster.versions import tiny

LATER = time.time() + 1000
IN_BLOB = "while a blob is written"
STEPS = [
    "before-blobs",
    IN_BLOB,
    "after-blob-1",
    "after-blob-2",
    "after-blob-3",
    "before-manifest",
    "after-manifest",
]


def killed_at(step: str, what: Callable[[], object]) -> int:
    """The exit code of a process that does `what` and is to end as kill -9 ends it, once it reaches the step."""

    def run() -> None:
        os.environ.update({failpoints.SWITCH: "1", failpoints.STEP: step})
        if step == IN_BLOB:
            os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        what()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode if process.exitcode is not None else 0


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_publisher_leaves_a_store_that_works(tmp_path: Path, step: str) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    serving = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 0)]))
    store.aliases.move("production", Move(1, serving.digest, 0.0))
    source = tiny.changes(checkpoint, tmp_path / "b.safetensors", [(0, 1), (0, 2), (1, 3)])

    def attempt() -> str:
        return publish(store, checkpoint, source, parent=serving.digest).digest

    assert killed_at(step, attempt) == -signal.SIGKILL
    for digest in store.manifests.all():
        assert store.missing(store.manifests.get(digest)) == (), "whoever finds a version finds all of it"
    assert len(store.files.unfinished(LATER)) == (step == IN_BLOB)
    assert len(store.manifests.all()) == (2 if step == "after-manifest" else 1)

    following = attempt()
    store.aliases.move("production", Move(2, following, 0.0))
    collect(store, history=1, min_age_s=0, now=LATER)
    assert store.manifests.all() == [following]
    kept = store.manifests.get(following)
    assert store.blobs.all() == kept.blobs and len(kept.blobs) == 4
    assert all(store.blobs.get(digest) for digest in kept.blobs)
    assert store.files.unfinished(LATER) == []


def test_a_killed_collector_leaves_whole_versions_and_the_next_one_ends_its_work(tmp_path: Path) -> None:
    checkpoint, store = tiny.base(tmp_path), Store(str(tmp_path / "store"))
    loose = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 0)]))
    serving = publish(store, checkpoint, tiny.changes(checkpoint, tmp_path / "b.safetensors", [(0, 1)]))
    step = "after-manifests-removed"

    def work() -> tuple[str, ...]:
        return collect(store, {serving.digest}, history=1, min_age_s=0, now=LATER).blobs

    assert killed_at(step, work) == -signal.SIGKILL
    assert store.manifests.all() == [serving.digest] and len(store.blobs.all()) == 2, loose.digest
    assert len(work()) == 1 and store.blobs.all() == store.manifests.get(serving.digest).blobs


def test_nothing_ends_that_is_not_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.STEP, "here")
    failpoints.reach("here")
    monkeypatch.setenv(failpoints.SWITCH, "1")
    failpoints.reach("elsewhere")


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    said: list[object] = []
    thread = threading.Thread(target=lambda: said.append(_fill(tmp_path, folder)))
    thread.start()
    thread.join()
    if isinstance(said[0], OSError):
        pytest.skip(f"no disk of a set size can be mounted here: {said[0]}")
    assert said == [None]


def _fill(tmp_path: Path, folder: Path) -> object:
    """What went wrong: an OSError if there is no small disk, None if all is as it should be."""
    try:
        small_disk(folder, 1 << 20)
    except OSError as error:
        return error
    try:
        checkpoint = large(tmp_path / "large")
        store = Store(str(folder / "store"))
        first = publish(store, checkpoint, changed(checkpoint, tmp_path / "a.safetensors", [0]))
        names = store.files.names("")
        with pytest.raises(VersionError, match="No space left on device") as caught:
            publish(
                store,
                checkpoint,
                changed(checkpoint, tmp_path / "b.safetensors", [1, 2, 3]),
                parent=first.digest,
            )
        assert caught.value.hint
        assert store.manifests.all() == [first.digest]
        assert store.missing(store.manifests.get(first.digest)) == ()
        assert store.files.unfinished(LATER) == [] and set(names) < set(store.files.names(""))
        # There is room again once what was written of the version that failed is taken away.
        collect(store, {first.digest}, history=1, min_age_s=0, now=LATER)
        assert store.files.names("") == names
        publish(store, checkpoint, changed(checkpoint, tmp_path / "b.safetensors", [1]), parent=first.digest)
    except BaseException as error:
        return error
    return None


def large(folder: Path) -> Checkpoint:
    """Experts of 300 kB each, of which three fit on the disk."""
    random = np.random.default_rng(0)
    shapes = {"w1.weight": (200, 250), "w3.weight": (200, 250), "w2.weight": (250, 200)}
    given = {
        tiny.name(0, expert, part): random.standard_normal(shape).astype(np.float16)
        for expert in range(tiny.EXPERTS)
        for part, shape in shapes.items()
    }
    return Checkpoint.open(tiny.save(folder, given))


def changed(checkpoint: Checkpoint, file: Path, experts: list[int]) -> Path:
    return tiny.changes(checkpoint, file, [(0, expert) for expert in experts])
