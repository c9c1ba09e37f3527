"""A training job: what is to be trained on what, put down where all its workers find it, and the steps of one worker.

    jobs/NAME/new, old    samples, as shards of the stream are written
    jobs/NAME/rows        rows of routers, of the experts that are cloned
    jobs/NAME/job         the job; written last, so that whoever finds it finds its samples
    jobs/NAME/progress    how far it is
    jobs/NAME/pause       there for as long as it is to wait

A job that is begun again under its name goes on with what was put down, whatever is asked for by then.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save

from actors.expert_slices import ChosenExperts
from actors.expert_training import Trained, Training, TrainSettings
from actors.router_review import add_clones
from actors.trainable_version import Encode, open_encoder, open_version
from actors.training_rows import Rows, RowSettings, part_of
from cluster.checkpoint import Checkpoint
from cluster.learning.records import Record, from_parquet, to_parquet
from cluster.learning.replay import Replay
from cluster.messages import StoreAddress
from cluster.versions.files import Files
from cluster.versions.store import Store

_PAUSE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What is to be trained, from which version."""

    name: str
    model: str
    """Folder of the base checkpoint."""
    store: StoreAddress
    """Of the versions."""
    parent: str
    """Digest of the version from which on; "": the base checkpoint."""
    chosen: tuple[tuple[int, int], ...]
    """(Layer, expert) of the parent."""
    settings: TrainSettings
    rows: RowSettings = field(default_factory=RowSettings)
    keep_every: int = 20
    """Steps after which all that the next one depends on is put down."""
    bfloat16: bool = False
    """Whether the model computes in bfloat16; what is trained is in float32 nevertheless."""
    threads: int = 1
    gentle: bool = True
    """Whether cores that somebody else wants are left to them."""
    clones: tuple[tuple[int, int], ...] = ()
    """Those of `chosen` of which copies are trained in their place."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is."""

    step: int
    steps: int
    loss: float
    pid: int = 0
    """Of the first worker."""


_JOB: Final = TypeAdapter(TrainingJob)
_PROGRESS: Final = TypeAdapter(Progress)
Saved = Mapping[str, Any]
"""All that the next step depends on, and what the steps before saw."""


class JobFiles:
    """Those of one job, on a disk or an object store that all workers reach."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._folder = files, f"jobs/{name}"

    def begin(
        self,
        job: TrainingJob,
        new: Sequence[Record],
        old: Mapping[str, Sequence[Record]],
        rows: Mapping[tuple[int, int], torch.Tensor] | None = None,
    ) -> TrainingJob:
        """Put a job down; the one that was begun under its name, if one was. `rows`: of what is cloned."""
        if self.begun:
            return self.job()
        self._files.renew(f"{self._folder}/new", to_parquet(new))
        known = [record for _, records in sorted(old.items()) for record in records]
        self._files.renew(f"{self._folder}/old", to_parquet(known))
        if rows:
            named = {f"{layer}.{expert}": row.contiguous() for (layer, expert), row in rows.items()}
            self._files.renew(f"{self._folder}/rows", save(named))
        self._files.renew(f"{self._folder}/job", _JOB.dump_json(job))
        return job

    @property
    def begun(self) -> bool:
        """Whether there is one."""
        return self._files.has(f"{self._folder}/job")

    def job(self) -> TrainingJob:
        """VersionError if there is none."""
        return _JOB.validate_json(self._files.read(f"{self._folder}/job"))

    def samples(self) -> tuple[list[Record], dict[str, list[Record]]]:
        """The new ones, and the old ones by domain."""
        new, known = (
            from_parquet(self._files.read(f"{self._folder}/{which}"), f"{self._folder}/{which}")
            for which in ("new", "old")
        )
        old: dict[str, list[Record]] = {}
        for record in known:
            old.setdefault(record.domain, []).append(record)
        return new, old

    def rows(self) -> dict[tuple[int, int], torch.Tensor]:
        """(Layer, expert) → the row of the router of its clone; the same for all workers, to the bit."""
        if not self._files.has(f"{self._folder}/rows"):
            return {}
        found = load(self._files.read(f"{self._folder}/rows"))
        return {(int(name.split(".")[0]), int(name.split(".")[1])): row for name, row in found.items()}

    def tell(self, progress: Progress) -> None:
        """Say how far it is."""
        self._files.renew(f"{self._folder}/progress", _PROGRESS.dump_json(progress))

    def progress(self) -> Progress | None:
        """How far it is; None before its first step."""
        if not self._files.has(f"{self._folder}/progress"):
            return None
        return _PROGRESS.validate_json(self._files.read(f"{self._folder}/progress"))

    def pause(self, on: bool) -> None:
        """Have it wait between two steps, or go on."""
        if on:
            self._files.renew(f"{self._folder}/pause", b"")
        else:
            self._files.remove(f"{self._folder}/pause")

    @property
    def paused(self) -> bool:
        """Whether it is to wait."""
        return self._files.has(f"{self._folder}/pause")

    def keep(self, saved: Saved) -> None:
        """Put a state down, of a job in one process, or of one that is done."""
        self._files.renew(f"{self._folder}/state", to_bytes(saved))

    def kept(self) -> Saved | None:
        """The state that was put down last."""
        name = f"{self._folder}/state"
        return from_bytes(self._files.read(name)) if self._files.has(name) else None

    def discard(self) -> None:
        """Take all of it away; it was done, or nobody wants it."""
        for name in (f"training/{self._folder.removeprefix('jobs/')}", self._folder):
            self._files.remove_folder(name)


@dataclass(frozen=True, slots=True)
class Worker:
    """One of those that train together."""

    rank: int = 0
    workers: int = 1
    total: Callable[[Sequence[torch.Tensor]], None] = lambda tensors: None
    """See `actors.expert_training.Training`."""


def open_job(job: TrainingJob, files: JobFiles) -> tuple[Any, ChosenExperts]:
    """The model from which on is trained, with its clones, and what of it is trained."""
    model = open_version(
        Checkpoint.open(Path(job.model)), Store(job.store.url, job.store.options), job.parent
    )
    clones = add_clones(model, files.rows())
    chosen = [(layer, clones.get((layer, expert), expert)) for layer, expert in job.chosen]
    return model, ChosenExperts(model, chosen)


def run_steps(
    job: TrainingJob,
    files: JobFiles,
    saved: Saved | None,
    keep: Callable[[Saved], None],
    *,
    worker: Worker | None = None,
    each: Callable[[Trained], None] = lambda trained: None,
) -> None:
    """Train from a state on (None: from the beginning), and have states put down by `keep`, that of the last step too.

    LearningError if the loss is no number, or the samples are of no use.
    """
    worker = worker or Worker()
    torch.set_num_threads(job.threads)
    checkpoint = Checkpoint.open(Path(job.model))
    rows = _rows(job, files, open_encoder(checkpoint))
    model, chosen = open_job(job, files)
    learner = Training(model, chosen, job.settings, total=worker.total)
    replay = Replay(rows.known, job.rows.need)
    told: list[list[float]] = []
    if saved is not None:
        learner.load(saved["training"])
        # A state of an older version has none.
        replay.load(saved.get("replay", {}))
        told = [list(one) for one in saved["told"]]
    mine = part_of(job.rows.rows, worker.rank, worker.workers)
    fresh = job.rows.rows - job.rows.replayed
    model.train()
    while learner.step < job.settings.steps:
        domains = rows.domains(learner.step, replay.weights)
        rows_BT = rows.of_step(learner.step, replay.weights)[mine.start : mine.stop]
        with _precision(job):
            trained = learner.train(
                rows_BT, len(mine) / job.rows.rows, replayed=max(0, mine.stop - max(mine.start, fresh))
            )
        if trained.risen:
            # Of all rows, by whoever had them, so that all workers go on with the same ones.
            risen_B = torch.zeros(job.rows.rows)
            risen_B[mine.start : mine.stop] = torch.tensor(trained.risen)
            worker.total([risen_B])
            replay.saw(zip(domains, risen_B[fresh:].tolist(), strict=True))
        told.append(list(astuple(trained))[:-1])
        if learner.step % job.keep_every == 0 or learner.step == job.settings.steps:
            keep({"training": learner.state(), "told": told, "replay": replay.state()})
        # Behind it, since this may wait for as long as it likes.
        each(trained)


def run_here(job: TrainingJob, files: JobFiles, each: Callable[[Trained], None]) -> Saved:
    """The whole job in this process, from where it was put down last; its last state."""
    run_steps(job, files, files.kept(), files.keep, each=each)
    saved = files.kept()
    assert saved is not None, "it has one step at least"
    return saved


class Pace:
    """Of the first worker: says how far it is, and waits while it is to; both once a second at most."""

    def __init__(
        self,
        job: TrainingJob,
        files: JobFiles,
        pid: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._job, self._files, self._pid = job, files, pid
        self._clock, self._sleep = clock, sleep
        self._looked = float("-inf")

    def __call__(self, trained: Trained) -> None:
        """A step was made."""
        last = trained.step == self._job.settings.steps
        if not last and self._clock() - self._looked < 1.0:
            return
        self._files.tell(Progress(trained.step, self._job.settings.steps, trained.loss, self._pid))
        while not last and self._files.paused:
            self._sleep(_PAUSE_S)
        self._looked = self._clock()


def told(saved: Saved) -> tuple[Trained, ...]:
    """What all steps saw."""
    return tuple(Trained(int(step), *seen) for step, *seen in saved["told"])


def to_bytes(saved: Saved) -> bytes:
    """A state, to be put down."""
    file = io.BytesIO()
    torch.save(dict(saved), file)
    return file.getvalue()


def from_bytes(data: bytes) -> Saved:
    """A state that was put down; nothing but tensors and plain values is read."""
    found: Saved = torch.load(io.BytesIO(data), weights_only=True)
    return found


def _rows(job: TrainingJob, files: JobFiles, encode: Encode) -> Rows:
    new, old = files.samples()
    known = {domain: [encode(record.text) for record in records] for domain, records in old.items()}
    return Rows([encode(record.text) for record in new], known, job.rows)


def _precision(job: TrainingJob) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if job.bfloat16 else nullcontext()
