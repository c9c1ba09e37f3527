"""One round of learning, phase by phase: what `learn run` does once, and the loop again and again.

1. choose     the experts that the new samples are about, by the version from which on is learnt
2. begin      the job with its samples is put down: from here on it is that job, however often it is begun again
3. train      here, or by Ray Train
4. judge      bits per byte before and after, in the domain and in all others
5. publish    what passes, with the gate's numbers; nothing serves it yet
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.checkpoint import Checkpoint
from cluster.config_learning import LearningConfig
from cluster.errors import LearningError
from cluster.learning.judge import GateSettings, GateVerdict, Judged, imbalance, judge, touched
from cluster.learning.needs import check_room, needs
from cluster.learning.records import Record
from cluster.messages import StoreAddress
from cluster.versions.files import Files
from cluster.versions.growth import routers
from cluster.versions.publish import base_manifest, publish
from cluster.versions.store import Store
from workloads.learn_experts import ExpertChoice, Samples, clones_for, experts_for, unsure

if TYPE_CHECKING:
    import torch

    from actors.bias_balance import BiasBalance
    from actors.distillation import TeacherSettings
    from actors.expert_slices import ChosenExperts
    from actors.ray_training import Workers
    from actors.trainable_version import Encode
    from actors.training_job import JobFiles, ReviewSettings, Saved, TrainingJob
    from actors.training_job import Progress as TrainingProgress
    from actors.version_comparison import Comparison

Progress = Callable[[str, float], None]
CloneRows = Mapping[tuple[int, int], "torch.Tensor"]
"""(Layer, expert) → the row of the router of its clone."""

_PAUSE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a round is about."""

    samples: Samples
    """Those that are learnt: all of the new ones, or what the model is least sure of."""
    choice: ExpertChoice
    rows: CloneRows


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the gate says, and what of the model it is about."""

    verdict: GateVerdict
    trained_share: float
    """Of the model's weights."""
    manifest: str = ""
    """Of the version that was published; "" where the gate did not let it through."""


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

    def choose(self, samples: Samples, parent: str, seed: int) -> Lesson:
        """The samples that are learnt, the experts that they are about, and rows of those that are to be cloned.

        LearningError if there are none.
        """
        from actors.text_routing import expert_modules
        from actors.trainable_version import open_encoder, open_version

        self.progress("loading the model", 0.0)
        model = open_version(self.checkpoint, self.store, self.own(parent))
        wanted, encode = self.settings.training, open_encoder(self.checkpoint)
        if wanted.select < 1:
            new = unsure(model, encode, samples.new, wanted.select, self.progress)
            samples = Samples(samples.domain, new, samples.old)
        weights = sum(parameter.numel() for parameter in model.parameters())
        largest = max(layout.expert_parameters for layout in self.checkpoint.layouts.values())
        found = experts_for(
            model,
            encode,
            samples,
            reach=wanted.reach,
            tokens=wanted.counted,
            seed=seed,
            progress=self.progress,
            most=max(1, int(wanted.most * weights / largest)),
        )
        rows: CloneRows = {}
        if wanted.clones:
            sizes = {layer: int(module.num_experts) for layer, module in expert_modules(model).items()}

            def room(layer: int) -> int:
                return max(0, wanted.clones - sizes[layer] + self.checkpoint.layout(layer).num_experts)

            rows = clones_for(model, encode, samples, found, room, tokens=wanted.counted, seed=seed)
            rows = {which: self._rounded(which[0], row) for which, row in rows.items()}
        del model
        gc.collect()
        if not found.chosen:
            raise LearningError(
                f"no expert is asked for {samples.domain} more than for what is known",
                "it may be known already; or give more text of it",
            )
        return Lesson(samples, found, rows)

    def _rounded(self, layer: int, row_H: torch.Tensor) -> torch.Tensor:
        """As the checkpoint's dtype can hold it: what will serve."""
        from actors.expert_slices import DTYPES

        name = next(name for name, of in routers(self.checkpoint).items() if of == layer)
        return row_H.to(DTYPES[self.checkpoint.tensors[name].dtype]).float()

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

    def judge(
        self,
        job: TrainingJob,
        saved: Saved,
        domain: str,
        held: Mapping[str, Sequence[Record]],
        *,
        seed: int,
        created: float | None = None,
    ) -> Judgement:
        """What the gate says of what was learnt, which is published if it passes.

        Published twice with the same `created` (seconds since 1970) it is the same version.
        """
        from actors.bias_balance import BiasBalance
        from actors.router_review import reviewed
        from actors.trainable_version import open_encoder
        from actors.training_run import open_job

        self.progress("the gate", 0.0)
        encode = open_encoder(self.checkpoint)
        judged = {name: self._for_gate(records, encode, seed) for name, records in held.items()}
        model, chosen = open_job(job, self.files(job.name))
        chosen.load(saved["training"]["masters"])
        # What is judged is what will serve, and not what was still finer.
        chosen.round_to(self.checkpoint)
        before, biases = [chosen.as_before], None
        if job.review is not None:
            routers = reviewed(model, self.checkpoint, saved["review"])
            biases = BiasBalance(model, 0.0)
            biases.load(saved["biases"])
            biases.round_to(self.checkpoint)
            before += [routers.as_before, biases.as_before]
        found, read = self._compared(model, _all_of(before), judged)
        known = [read[name] for name in held if name != domain]
        counts = [one.before for one in known], [one.after for one in known]
        verdict = judge(
            domain,
            found,
            self.gate,
            # Of domains with as many tokens each, near enough.
            divergence=sum(one.divergence for one in known) / max(1, len(known)),
            imbalance=imbalance(*counts),
            touched=touched(*counts, self.checkpoint.top_k),
        )
        share = chosen.share
        manifest = ""
        if verdict.passed:
            manifest = self._publish(model, chosen, biases, job, domain, verdict, created)
        del model, chosen, before, biases
        gc.collect()
        return Judgement(verdict, share, manifest)

    def _publish(
        self,
        model: Any,
        chosen: ChosenExperts,
        biases: BiasBalance | None,
        job: TrainingJob,
        domain: str,
        verdict: GateVerdict,
        created: float | None,
    ) -> str:
        from safetensors.torch import save_file

        from actors.router_review import router_tensors
        from actors.text_routing import expert_modules

        tensors = chosen.tensors(self.checkpoint)
        routers = set(expert_modules(model)) if job.review else {layer for layer, _ in job.clones}
        if routers:
            tensors |= router_tensors(model, self.checkpoint, routers)
        if biases is not None:
            tensors |= biases.tensors(self.checkpoint)
        with tempfile.TemporaryDirectory(prefix="expertmesh-learn-") as folder:
            file = Path(folder) / "learnt.safetensors"
            save_file(tensors, file)
            return publish(
                self.store,
                self.checkpoint,
                file,
                parent=job.parent,
                author=self.author,
                reason=f"learnt {domain}",
                metrics={**verdict.metrics, "trained_share": chosen.share},
                created=created,
            ).digest

    def _for_gate(self, records: Sequence[Record], encode: Encode, seed: int) -> list[tuple[str, list[int]]]:
        """Texts with their tokens."""
        wanted = self.settings.gate
        picked = random.Random(seed).sample(list(records), min(wanted.texts, len(records)))
        found = [(record.text, encode(record.text)) for record in picked]
        return [(text, tokens[: wanted.tokens]) for text, tokens in found if len(tokens) > 1]

    def _compared(
        self,
        model: Any,
        as_before: Callable[[], AbstractContextManager[None]],
        judged: Mapping[str, Sequence[tuple[str, list[int]]]],
    ) -> tuple[dict[str, list[Judged]], dict[str, Comparison]]:
        """Every held-out text by the version before and by what was learnt, by domain."""
        from actors.version_comparison import compare

        count, done = sum(map(len, judged.values())), 0

        def told() -> None:
            nonlocal done
            done += 1
            self.progress("the gate", done / count)

        read = {
            name: compare(model, as_before, [tokens for _, tokens in texts], told)
            for name, texts in judged.items()
        }
        found = {
            name: [
                Judged(len(text.encode()), *bits)
                for (text, _), bits in zip(texts, read[name].bits, strict=True)
            ]
            for name, texts in judged.items()
        }
        return found, read

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


def _all_of(
    contexts: Sequence[Callable[[], AbstractContextManager[None]]],
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return entered
