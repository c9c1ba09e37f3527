"""One round of learning, phase by phase: what `learn run` does once, and the loop again and again.

1. choose     the experts that the new samples are about, by the version from which on is learnt (`learn_lesson`)
2. begin      the job with its samples is put down: from here on it is that job, however often it is begun again
3. train      here, or by Ray Train
4. judge      bits per byte before and after, in the domain and in all others (`learn_judging`)
5. publish    what passes, with the gate's numbers; nothing serves it yet
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.checkpoint import Checkpoint
from cluster.config_learning import LearningConfig
from cluster.errors import LearningError
from cluster.learning.judge import GateSettings
from cluster.learning.needs import check_room, needs
from cluster.messages import StoreAddress
from cluster.versions.files import Files
from cluster.versions.publish import base_manifest
from cluster.versions.store import Store
from workloads.learn_lesson import Lesson

if TYPE_CHECKING:
    from actors.distillation import TeacherSettings
    from actors.ray_training import Workers
    from actors.training_job import JobFiles, ReviewSettings, Saved, TrainingJob
    from actors.training_job import Progress as TrainingProgress

Progress = Callable[[str, float], None]

_PAUSE_S: Final = 0.5


@dataclass(frozen=True)
class Workshop:
    """Where a model learns."""

    checkpoint: Checkpoint
    versions: StoreAddress
    alias: str
    """Of the version that serves."""
    state: StoreAddress
    """Of trainings."""
    settings: LearningConfig
    author: str
    progress: Progress
    pausing: Callable[[], bool] = lambda: False
    """Whether training is to wait; asked several times a second."""

    @property
    def gate(self) -> GateSettings:
        """What is asked of what was learnt."""
        wanted = self.settings.gate
        return GateSettings(
            wanted.level,
            wanted.most_rise,
            wanted.most_divergence,
            wanted.most_imbalance,
            wanted.fewest,
            wanted.most_touched,
        )

    @property
    def store(self) -> Store:
        """Of versions."""
        return Store(self.versions.url, self.versions.options)

    def files(self, name: str) -> JobFiles:
        """Those of a job."""
        from actors.training_job import JobFiles

        return JobFiles(Files(self.state.url, **self.state.options), name)

    def serving(self) -> str:
        """Digest of the version that serves, by the store; of the base checkpoint where none ever did.

        LearningError if it is of another model.
        """
        now = self.store.aliases.current(self.alias)
        if now is None:
            return base_manifest(self.checkpoint).digest
        if self.store.manifests.get(now.manifest).model != self.checkpoint.digest:
            raise LearningError(
                f"version {now.manifest[:12]}, which serves, is of another model than {self.checkpoint.path}",
                "learn with the checkpoint that it was made from, or name another store",
            )
        return now.manifest

    def check_room(self) -> None:
        """LearningError if this machine has too little memory or disk for a training of this model."""
        import shutil

        import psutil

        training = self.settings.training
        found = needs(self.checkpoint, training.rows, training.length, folder_bytes(Path(training.teacher)))
        check_room(
            found.worker * max(1, training.workers),
            psutil.virtual_memory().available,
            "memory",
            "fewer workers, learning.training.rows or length take less",
        )
        for url in (self.state.url, self.versions.url):
            if "://" not in url:
                place = Path(url)
                while not place.exists():
                    place = place.parent
                check_room(found.disk, shutil.disk_usage(place).free, f"disk at {place}", "make room there")

    def begin(
        self,
        name: str,
        lesson: Lesson,
        parent: str,
        seed: int,
    ) -> TrainingJob:
        """Put a job down, with its samples; the one that was begun under this name, if one was."""
        from actors.expert_training import TrainSettings
        from actors.training_job import TrainingJob
        from actors.training_rows import RowSettings

        wanted = self.settings.training
        job = TrainingJob(
            name,
            str(self.checkpoint.path),
            self.versions,
            self.own(parent),
            tuple((one.layer, one.expert) for one in lesson.choice.chosen),
            TrainSettings(wanted.steps, wanted.rate, max(1, wanted.steps // 10), wanted.beta, wanted.hold),
            RowSettings(wanted.rows, wanted.length, wanted.replay, wanted.need, seed),
            wanted.keep_every,
            wanted.bfloat16,
            wanted.threads,
            wanted.gentle,
            tuple(sorted(lesson.rows)),
            wanted.parallel,
            self._curves(name),
            self._teacher(),
            self._review(),
        )
        return self.files(name).begin(job, lesson.samples.new, lesson.samples.old, lesson.rows)

    def train(self, name: str) -> Saved:
        """Do a job that was put down, from where it was; what it comes to, which is put down as well.

        LearningError if it can't be done; ExpertmeshError if workers are lost too often.
        """
        from actors.training_run import run_here

        files = self.files(name)
        job = files.job()
        saved = files.kept()
        if saved is not None and len(saved["told"]) == job.settings.steps:
            return saved
        if not self.settings.training.workers:
            return run_here(job, files, lambda trained: self._made(trained.step / job.settings.steps))
        from actors.ray_training import run_on_ray

        paused = files.paused

        def told(now: TrainingProgress) -> None:
            nonlocal paused
            self.progress("training", now.step / now.steps)
            if self.pausing() != paused:
                paused = not paused
                files.pause(paused)

        self.progress("training", 0.0)
        saved = run_on_ray(name, self.state, self._workers(), told)
        files.keep(saved)
        return saved

    def _made(self, fraction: float) -> None:
        """A step was made in this process, which waits where it is to."""
        self.progress("training", fraction)
        while self.pausing():
            time.sleep(_PAUSE_S)

    def _curves(self, name: str) -> str:
        """Where the curves of a job go; each has a folder of its own."""
        place = self.settings.tensorboard
        if not place:
            return ""
        return (
            f"{place.rstrip('/')}/{name}"
            if "://" in place
            else str(Path(place).expanduser().absolute() / name)
        )

    def _teacher(self) -> TeacherSettings | None:
        from actors.distillation import TeacherSettings

        wanted = self.settings.training
        if not wanted.teacher:
            return None
        return TeacherSettings(
            str(Path(wanted.teacher).expanduser().absolute()),
            wanted.teacher_weight,
            wanted.teacher_temperature,
            wanted.teacher_features,
        )

    def _review(self) -> ReviewSettings | None:
        from actors.training_job import ReviewSettings

        wanted = self.settings.training
        steps = min(wanted.steps - 1, round(wanted.review * wanted.steps))
        return ReviewSettings(steps, wanted.review_rate, wanted.balance, wanted.bias_rate) if steps else None

    def own(self, parent: str) -> str:
        """The version as others are told it: "" for the checkpoint itself, which need not be in the store."""
        return "" if parent == base_manifest(self.checkpoint).digest else parent

    def _workers(self) -> Workers:
        from actors.ray_training import Workers

        wanted = self.settings.training
        return Workers(
            wanted.workers,
            wanted.max_workers or wanted.workers,
            wanted.cpus,
            dict(wanted.labels),
            wanted.max_failures,
        )


def folder_bytes(folder: Path) -> int:
    """Of the weights in a folder; 0 where there are none."""
    if folder == Path():
        return 0
    return sum(file.stat().st_size for file in folder.expanduser().glob("*.safetensors"))
