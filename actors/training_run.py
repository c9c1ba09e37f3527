"""One worker of a training job, or all of it in one process: its steps, and what learns in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from actors.bias_balance import BiasBalance
from actors.distillation import Distillation, open_teacher
from actors.expert_parallel import divide_experts, owners
from actors.expert_slices import ChosenExperts
from actors.expert_training import Trained, Training, TrainSettings, merged, rate
from actors.router_review import Balance, add_clones, router_weights
from actors.text_routing import expert_modules
from actors.trainable_version import Encode, open_encoder, open_version
from actors.training_curves import Curves
from actors.training_job import JobFiles, Progress, ReviewSettings, Saved, TrainingJob
from actors.training_rows import Rows, part_of
from cluster.checkpoint import Checkpoint
from cluster.learning.replay import Replay
from cluster.versions.store import Store

_PAUSE_S: Final = 0.5


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
        replay = Replay(rows.known, job.rows.need)
        told: list[list[float]] = []
        if saved is not None:
            lessons.load(saved)
            # A state of an older version has none.
            replay.load(saved.get("replay", {}))
            told = [list(one) for one in saved["told"]]
        curves = None
        if job.curves and worker.rank == 0:
            curves = stack.enter_context(closing(Curves(job.curves, len(told) + 1)))
        mine = part_of(job.rows.rows, worker.rank, worker.workers)
        fresh = job.rows.rows - job.rows.replayed
        model.train()
        for step in range(len(told), job.settings.steps):
            domains = rows.domains(step, replay.weights)
            rows_BT = rows.of_step(step, replay.weights)[mine.start : mine.stop]
            known = max(0, mine.stop - max(mine.start, fresh))
            with _precision(job):
                trained = lessons.train(step, rows_BT, len(mine) / job.rows.rows, known)
            if trained.risen:
                # Of all rows, by whoever had them, so that all workers go on with the same ones.
                risen_B = torch.zeros(job.rows.rows)
                risen_B[mine.start : mine.stop] = torch.tensor(trained.risen)
                worker.total([risen_B])
                replay.saw(zip(domains, risen_B[fresh:].tolist(), strict=True))
            told.append(list(astuple(trained))[:-1])
            if (step + 1) % job.keep_every == 0 or step + 1 == job.settings.steps:
                keep({**lessons.state(), "told": told, "replay": replay.state()})
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

    def train(self, step: int, rows_BT: torch.Tensor, part: float, known: int) -> Trained:
        """One step, counted from 0; the last `known` rows are replayed."""
        trained = self._of(step).train(rows_BT, part, known)
        if self._biases is not None:
            self._biases.nudge()
        return replace(trained, step=step + 1)

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
        warm = max(1, review.steps // 10)
        return replace(self._job.settings, steps=review.steps, rate=review.rate, warm_steps=warm)


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


def _rows(job: TrainingJob, files: JobFiles, encode: Encode) -> Rows:
    new, old = files.samples()
    known = {domain: [encode(record.text) for record in records] for domain, records in old.items()}
    return Rows([encode(record.text) for record in new], known, job.rows)


def _precision(job: TrainingJob) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if job.bfloat16 else nullcontext()
