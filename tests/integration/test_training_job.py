"""Training jobs on Ray Train: with one worker or two, and whatever is killed, the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.expert_training import TrainSettings
from actors.ray_training import Workers, run_on_ray
from actors.training_job import JobFiles, Progress, ReviewSettings, Saved, TrainingJob, told
from actors.training_rows import RowSettings
from actors.training_run import run_here
from cluster.auth import ensure_token
from cluster.errors import LearningError
from cluster.learning.records import Record
from cluster.messages import StoreAddress
from cluster.versions.files import Files
from tests.e2e.programs import wait_for
from tests.tiny_dense import make_tiny_dense
from workloads.bench.ray_nodes import RayNodes, Worker
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow

STEPS = 12
REVIEW = ReviewSettings(3)
START_S = 300.0
"""Of workers, on a busy machine."""


def records(domain: str, words: str) -> list[Record]:
    return [
        Record("text", f"{domain}{n}", 1.0, domain=domain, answer=f"{words} {n} times over " * (n % 5 + 1))
        for n in range(20)
    ]


NEW = records("law", "the court heard the case and ruled")
OLD = {"code": records("code", "a river boat left early that day")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return upcycle(make_tiny_dense(folder / "dense"), folder / "model", dtype="float32")


Begin = Callable[..., JobFiles]


@pytest.fixture
def begin(model: Path, tmp_path: Path) -> Begin:
    """Puts a job down that is to keep its state after each step."""

    def call(name: str, **changes: Any) -> JobFiles:
        job = TrainingJob(
            name,
            str(model),
            StoreAddress(str(tmp_path / "store")),
            "",
            ((0, 1), (1, 2), (1, 5)),
            TrainSettings(STEPS, 0.01, 3),
            RowSettings(6, 32),
            keep_every=1,
            gentle=False,
        )
        files = JobFiles(Files(str(tmp_path / "state")), name)
        files.begin(replace(job, **changes), NEW, OLD)
        return files

    return call


@pytest.fixture
def whole(begin: Begin) -> Saved:
    """What an uninterrupted job in one process comes to."""
    files = begin("whole", review=REVIEW)
    return run_here(files.job(), files, lambda trained: None)


def same(saved: Saved, whole: Saved) -> None:
    """All losses are those of the uninterrupted job, and so is what was trained."""
    assert [one.step for one in told(saved)] == list(range(1, STEPS + 1))
    for one, other in zip(told(saved), told(whole), strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
    for what in ("training", "review"):
        for name, master in whole[what]["masters"].items():
            assert (saved[what]["masters"][name] - master).abs().max() < 1e-3


def checkpoints(folder: Path, name: str) -> bool:
    """Whether Ray Train has put a state down."""
    snapshot = folder / "state" / "training" / name / "checkpoint_manager_snapshot.json"
    return snapshot.exists() and "checkpoint_dir_name" in snapshot.read_text()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a curve as TensorBoard would read them: the last that was written of each step."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[int, float] = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == event.session_log.START:
                found = {step: value for step, value in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == name:
                    found[event.step] = value.simple_value
    return sorted(found.items())


def test_in_one_process_it_goes_on_with_the_job_that_was_begun(
    begin: Begin, whole: Saved, tmp_path: Path
) -> None:
    files = begin("broken", review=REVIEW, curves=str(tmp_path / "curves"))

    def stop(trained: Any) -> None:
        if trained.step == STEPS - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here(files.job(), files, stop)
    found = files.kept()
    assert found is not None and len(told(found)) == STEPS - 1
    # Asked for anew with other settings and samples, it is the one that was begun.
    job = files.begin(replace(files.job(), settings=TrainSettings(3)), NEW[:1], {})
    seen: list[int] = []
    found = run_here(job, files, lambda trained: seen.append(trained.step))
    assert seen == [STEPS], "it was in the midst of the review"
    same(found, whole)
    drawn = curve(tmp_path / "curves", "training/loss")
    assert [step for step, _ in drawn] == list(range(1, STEPS + 1))
    assert [value for _, value in drawn] == pytest.approx([one.loss for one in told(found)], rel=1e-5)
    assert whole["training"]["masters"].keys() == found["training"]["masters"].keys()
    files.discard()
    assert files.kept() is None and files.progress() is None


def test_computing_in_bfloat16_is_nearly_the_same(begin: Begin, whole: Saved) -> None:
    files = begin("half", bfloat16=True)
    found = run_here(files.job(), files, lambda trained: None)
    assert told(found)[-1].loss == pytest.approx(told(whole)[-1].loss, rel=0.05)
    assert told(found)[-1].loss != told(whole)[-1].loss
    assert all(master.dtype.itemsize == 4 for master in found["training"]["masters"].values())


@pytest.mark.long
def test_one_of_two_workers_is_killed(ray_cluster: str, begin: Begin, whole: Saved, tmp_path: Path) -> None:
    files = begin("worker", parallel="sharded", review=REVIEW)
    files.pause(True)
    seen: list[Progress] = []
    found: list[Saved] = []
    state = StoreAddress(str(tmp_path / "state"))
    thread = threading.Thread(
        target=lambda: found.append(run_on_ray("worker", state, Workers(2, 2), seen.append)), daemon=True
    )
    thread.start()
    wait_for(lambda: seen and checkpoints(tmp_path, "worker"), START_S, "the first state")
    os.kill(seen[-1].pid, signal.SIGKILL)
    files.pause(False)
    thread.join(START_S)
    same(found[0], whole)
    assert next(one.step for one in seen if one.pid != seen[0].pid) > 1, "it went on, and did not begin anew"


@pytest.mark.long
def test_all_of_a_job_is_killed_and_it_goes_on_with_fewer_workers(
    ray_cluster: str, begin: Begin, whole: Saved, tmp_path: Path
) -> None:
    files = begin("job", review=REVIEW)
    files.pause(True)
    here = [sys.executable, "-m", "tests.integration.training_driver"]
    driver = subprocess.Popen(
        [*here, ray_cluster, os.environ["RAY_AUTH_TOKEN_PATH"], str(tmp_path / "state"), "job"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for(
            lambda: driver.poll() is not None or (files.progress() and checkpoints(tmp_path, "job")),
            START_S,
            "the first state",
        )
        assert driver.poll() is None
        before = files.progress()
        assert before is not None
    finally:
        driver.kill()
        driver.wait(30)
    wait_for(lambda: not psutil.pid_exists(before.pid), 120, "the worker to go with its job")
    files.pause(False)
    seen: list[Progress] = []
    saved = run_on_ray("job", StoreAddress(str(tmp_path / "state")), Workers(1, 2), seen.append)
    same(saved, whole)
    # It was asked for with as many as are possible, and has them all.
    assert next(one.step for one in seen if one.pid != before.pid) > 1


@pytest.mark.long
def test_what_can_not_be_done_is_not_tried_again(ray_cluster: str, begin: Begin, tmp_path: Path) -> None:
    begin("never", chosen=((7, 0),))
    with pytest.raises(LearningError, match="no expert 0 in layer 7"):
        run_on_ray("never", StoreAddress(str(tmp_path / "state")), Workers(), lambda progress: None)


@pytest.mark.long
def test_a_node_that_joins_takes_part(begin: Begin, whole: Saved, tmp_path: Path) -> None:
    files = begin("grows", review=REVIEW, parallel="experts")
    files.pause(True)
    token = tmp_path / "token"
    ensure_token(token)
    nodes = RayNodes(token, [Worker("a")], {"OMP_NUM_THREADS": "1"})
    driver = None
    try:
        nodes.start(head_cpus=0)
        here = [sys.executable, "-m", "tests.integration.training_driver"]
        numbers = ("1", "2", "1", "1")
        driver = subprocess.Popen(
            [*here, nodes.address, str(token), str(tmp_path / "state"), "grows", *numbers],
            env=nodes.environment,
        )
        wait_for(lambda: checkpoints(tmp_path, "grows"), START_S, "the first state")
        first = files.progress()
        assert first is not None and first.workers == 1
        nodes.join(Worker("b"))
        wait_for(lambda: (now := files.progress()) and now.workers == 2, START_S, "the second worker")
        files.pause(False)
        assert driver.wait(START_S) == 0
    finally:
        if driver is not None:
            driver.kill()
            driver.wait(30)
        nodes.close()
    saved, last = files.kept(), files.progress()
    assert saved is not None and last is not None and last.workers == 2
    same(saved, whole)
