"""What the first worker says of how far it is, and that it waits where it is to."""

from __future__ import annotations

from pathlib import Path

from actors.expert_training import Trained, TrainSettings
from actors.training_job import JobFiles, Progress, TrainingJob
from actors.training_run import Pace
from cluster.messages import StoreAddress
from cluster.versions.files import Files


def test_it_tells_once_a_second_and_waits_while_it_is_to(tmp_path: Path) -> None:
    job = TrainingJob("one", "model", StoreAddress("store"), "", ((0, 1),), TrainSettings(9))
    files = JobFiles(Files(str(tmp_path)), "one")
    assert files.begin(job, [], {}) == files.job() == job and files.samples() == ([], {})
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            files.pause(False)

    pace = Pace(job, files, 7, clock=lambda: now[0], sleep=sleep)
    assert files.progress() is None
    pace(Trained(1, 0.5, 0.4, 0.1, 1.0))
    assert files.progress() == Progress(1, 9, 0.5, 7)
    now[0] = 0.9
    files.pause(True)
    pace(Trained(2, 0.25, 0.4, 0.1, 1.0))
    assert not slept and files.progress() == Progress(1, 9, 0.5, 7)
    now[0] = 1.1
    pace(Trained(3, 0.25, 0.4, 0.1, 1.0))
    assert len(slept) == 3 and not files.paused and files.progress() == Progress(3, 9, 0.25, 7)
    files.pause(True)
    pace(Trained(9, 0.125, 0.4, 0.1, 1.0))
    assert len(slept) == 3 and files.progress() == Progress(9, 9, 0.125, 7), "the last is told, and ends"
    files.discard()
    assert not list(tmp_path.rglob("*/*/*")) and not files.paused
