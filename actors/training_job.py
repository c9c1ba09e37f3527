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
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save

from actors.bias_balance import BiasBalance
from actors.distillation import Distillation, TeacherSettings, open_teacher
from actors.expert_parallel import divide_experts, owners
from actors.expert_slices import ChosenExperts
from actors.expert_training import Trained, Training, TrainSettings, merged, rate
from actors.router_review import Balance, add_clones, router_weights
from actors.text_routing import expert_modules
from actors.trainable_version import Encode, open_encoder, open_version
from actors.training_curves import Curves
from actors.training_rows import Rows, RowSettings, part_of
from cluster.checkpoint import Checkpoint
from cluster.learning.records import Record, from_parquet, to_parquet
from cluster.messages import StoreAddress
from cluster.versions.files import Files
from cluster.versions.store import Store

_PAUSE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class ReviewSettings:
    """In which routers alone learn, so that text goes to where it is known best by then."""

    steps: int
    """The last ones of a job."""
    rate: float = 1e-3
    balance: float = 0.01
    """Weight of the auxiliary loss that keeps experts from being left alone."""
    bias_rate: float = 1e-3
    """By which a router's bias for the choice moves in a step, where it has one."""


Parallel = Literal["rows", "experts", "sharded"]
"""What several workers divide: the rows of a step; each layer's experts as well, where as many are trained as there are
workers; or all else too.
"""


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
    parallel: Parallel = "rows"
    curves: str = ""
    """Folder or URL for TensorBoard's curves of this job; "": none."""
    teacher: TeacherSettings | None = None
    review: ReviewSettings | None = None

    @property
    def expert_steps(self) -> int:
        """Steps in which experts learn; routers learn in those behind."""
        return self.settings.steps - (self.review.steps if self.review else 0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is."""

    step: int
    steps: int
    loss: float
    pid: int = 0
    """Of the first worker."""
    workers: int = 1


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

    def apart(self, job: TrainingJob) -> bool:
        """Whether each worker has experts of its own, so that a state is of them all together."""
        return self.workers > 1 and job.parallel != "rows" and len(set(job.chosen)) >= self.workers


def open_job(job: TrainingJob, files: JobFiles, worker: Worker | None = None) -> tuple[Any, ChosenExperts]:
    """The model from which on is trained, with its clones, and what of it is trained: by a worker, or all of it."""
    model = open_version(
        Checkpoint.open(Path(job.model)), Store(job.store.url, job.store.options), job.parent
    )
    clones = add_clones(model, files.rows())
    chosen = [(layer, clones.get((layer, expert), expert)) for layer, expert in job.chosen]
    if worker is None or not worker.apart(job):
        return model, ChosenExperts(model, chosen)
    sizes = {layer: int(module.num_experts) for layer, module in expert_modules(model).items()}
    places = divide_experts(model, owners(sizes, chosen, worker.workers), worker.rank)
    if job.parallel == "sharded":
        from actors.sharded_dense import shard_dense

        shard_dense(model)
    return model, ChosenExperts(model, chosen, places)


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
    with ExitStack() as stack:
        model, chosen = open_job(job, files, worker)
        lessons = _Lessons(job, model, chosen, worker)
        if job.teacher is not None:
            lessons.taught = Distillation(model, open_teacher(job.teacher, checkpoint), job.teacher)
            stack.enter_context(lessons.taught.watched())
        told: list[list[float]] = []
        if saved is not None:
            lessons.load(saved)
            told = [list(one) for one in saved["told"]]
        curves = None
        if job.curves and worker.rank == 0:
            curves = stack.enter_context(closing(Curves(job.curves, len(told) + 1)))
        mine = part_of(job.rows.rows, worker.rank, worker.workers)
        model.train()
        for step in range(len(told), job.settings.steps):
            rows_BT = rows.of_step(step)[mine.start : mine.stop]
            with _precision(job):
                trained = replace(lessons.train(step, rows_BT, len(mine) / job.rows.rows), step=step + 1)
            told.append(list(astuple(trained)))
            if (step + 1) % job.keep_every == 0 or step + 1 == job.settings.steps:
                keep({**lessons.state(), "told": told})
            if curves is not None:
                curves.add(trained, lessons.rate(step))
            # Behind it, since this may wait for as long as it likes.
            each(trained)


class _Lessons:
    """What learns in a job: experts, and then routers."""

    def __init__(self, job: TrainingJob, model: Any, chosen: ChosenExperts, worker: Worker) -> None:
        self._job, self._model, self._chosen, self._worker = job, model, chosen, worker
        self.taught: Distillation | None = None
        self._experts: Training | None = None
        self._review: Training | None = None
        self._biases: BiasBalance | None = None

    def train(self, step: int, rows_BT: torch.Tensor, part: float) -> Trained:
        """One step, counted from 0."""
        trained = self._of(step).train(rows_BT, part)
        if self._biases is not None:
            self._biases.nudge()
        return trained

    def rate(self, step: int) -> float:
        """At which is learnt in a step."""
        review = self._job.review
        if step < self._job.expert_steps or review is None:
            return rate(self._schedule(), step)
        return rate(self._review_schedule(review), step - self._job.expert_steps)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        found = {"training": self._of(0).state()}
        if self._review is None or self._biases is None:
            return found
        return {**found, "review": self._review.state(), "biases": self._biases.state()}

    def load(self, saved: Saved) -> None:
        """Go on where a state was put down."""
        self._of(0).load(saved["training"])
        if "review" in saved:
            self._of(self._job.expert_steps).load(saved["review"])
            assert self._biases is not None
            self._biases.load(saved["biases"])

    def _of(self, step: int) -> Training:
        job, worker = self._job, self._worker
        if self._experts is None:
            self._experts = Training(
                self._model,
                self._chosen,
                self._schedule(),
                aside=self.taught,
                total=worker.total,
                apart=worker.apart(job),
            )
        if step < job.expert_steps or job.review is None:
            return self._experts
        if self._review is None:
            balance = Balance(self._model, job.review.balance)
            # For as long as the model is there; nobody else computes with it.
            balance.watch()
            self._biases = BiasBalance(self._model, job.review.bias_rate, worker.total)
            self._review = Training(
                self._model,
                router_weights(self._model),
                self._review_schedule(job.review),
                aside=self._beside(balance),
                total=worker.total,
            )
        return self._review

    def _beside(self, balance: Balance) -> Callable[[], torch.Tensor | None]:
        def aside() -> torch.Tensor | None:
            found = [balance()] if self.taught is None else [balance(), self.taught()]
            losses = [loss for loss in found if loss is not None]
            return torch.stack(losses).sum() if losses else None

        return aside

    def _schedule(self) -> TrainSettings:
        return replace(self._job.settings, steps=self._job.expert_steps)

    def _review_schedule(self, review: ReviewSettings) -> TrainSettings:
        return TrainSettings(review.steps, review.rate, max(1, review.steps // 10), self._job.settings.beta)


def whole(saved: Sequence[Saved]) -> Saved:
    """One state of those that workers put down of the same step."""
    return {**saved[0], "training": merged([one["training"] for one in saved])}


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
        workers: int = 1,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._job, self._files, self._pid, self._workers = job, files, pid, workers
        self._clock, self._sleep = clock, sleep
        self._looked = float("-inf")

    def __call__(self, trained: Trained) -> None:
        """A step was made."""
        last = trained.step == self._job.settings.steps
        if not last and self._clock() - self._looked < 1.0:
            return
        self._files.tell(
            Progress(trained.step, self._job.settings.steps, trained.loss, self._pid, self._workers)
        )
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
