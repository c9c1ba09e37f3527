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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.checkpoint import Checkpoint
from cluster.config_learning import LearningConfig
from cluster.errors import LearningError
from cluster.learning.judge import GateSettings, GateVerdict, Judged, judge
from cluster.learning.needs import check_room, needs
from cluster.learning.records import Record
from cluster.messages import StoreAddress
from cluster.versions.files import Files
from cluster.versions.growth import routers
from cluster.versions.publish import base_manifest, publish
from cluster.versions.store import Store
from workloads.learn_experts import ExpertChoice, Samples, clones_for, experts_for

if TYPE_CHECKING:
    import torch

    from actors.expert_slices import ChosenExperts
    from actors.ray_training import Workers
    from actors.training_job import Encode, JobFiles, Saved, TrainingJob
    from actors.training_job import Progress as TrainingProgress

Progress = Callable[[str, float], None]
CloneRows = Mapping[tuple[int, int], "torch.Tensor"]
"""(Layer, expert) → the row of the router of its clone."""

# Held-out texts of a domain that are judged by, and tokens of each.
_MOST_JUDGED: Final = 48
_JUDGED_TOKENS: Final = 256
_COUNTED_TOKENS: Final = 20_000
_PAUSE_S: Final = 0.5


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
    gate: GateSettings = field(default_factory=GateSettings)
    pausing: Callable[[], bool] = lambda: False
    """Whether training is to wait; asked several times a second."""

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
        found = needs(self.checkpoint, training.rows, training.length)
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

    def choose(self, samples: Samples, parent: str, seed: int) -> tuple[ExpertChoice, CloneRows]:
        """The experts that the new samples are about, and rows of routers of those that are to be cloned.

        LearningError if there are none.
        """
        from actors.text_routing import expert_modules
        from actors.trainable_version import open_encoder, open_version

        self.progress("loading the model", 0.0)
        model = open_version(self.checkpoint, self.store, self._own(parent))
        wanted, encode = self.settings.training, open_encoder(self.checkpoint)
        weights = sum(parameter.numel() for parameter in model.parameters())
        largest = max(layout.expert_parameters for layout in self.checkpoint.layouts.values())
        found = experts_for(
            model,
            encode,
            samples,
            reach=wanted.reach,
            tokens=_COUNTED_TOKENS,
            seed=seed,
            progress=self.progress,
            most=max(1, int(wanted.most * weights / largest)),
        )
        rows: CloneRows = {}
        if wanted.clones:
            sizes = {layer: int(module.num_experts) for layer, module in expert_modules(model).items()}

            def room(layer: int) -> int:
                return max(0, wanted.clones - sizes[layer] + self.checkpoint.layout(layer).num_experts)

            rows = clones_for(model, encode, samples, found, room, tokens=_COUNTED_TOKENS, seed=seed)
            rows = {which: self._rounded(which[0], row) for which, row in rows.items()}
        del model
        gc.collect()
        if not found.chosen:
            raise LearningError(
                f"no expert is asked for {samples.domain} more than for what is known",
                "it may be known already; or give more text of it",
            )
        return found, rows

    def _rounded(self, layer: int, row_H: torch.Tensor) -> torch.Tensor:
        """As the checkpoint's dtype can hold it: what will serve."""
        from actors.expert_slices import DTYPES

        name = next(name for name, of in routers(self.checkpoint).items() if of == layer)
        return row_H.to(DTYPES[self.checkpoint.tensors[name].dtype]).float()

    def begin(
        self,
        name: str,
        samples: Samples,
        choice: ExpertChoice,
        rows: CloneRows,
        parent: str,
        seed: int,
    ) -> TrainingJob:
        """Put a job down, with its samples; the one that was begun under this name, if one was."""
        from actors.expert_training import TrainSettings
        from actors.training_job import RowSettings, TrainingJob

        wanted = self.settings.training
        job = TrainingJob(
            name,
            str(self.checkpoint.path),
            self.versions,
            self._own(parent),
            tuple((one.layer, one.expert) for one in choice.chosen),
            TrainSettings(wanted.steps, wanted.rate, max(1, wanted.steps // 10), wanted.beta, wanted.hold),
            RowSettings(wanted.rows, wanted.length, wanted.replay, wanted.need, seed),
            wanted.keep_every,
            wanted.bfloat16,
            wanted.threads,
            wanted.gentle,
            tuple(sorted(rows)),
        )
        return self.files(name).begin(job, samples.new, samples.old, rows)

    def train(self, name: str) -> Saved:
        """Do a job that was put down, from where it was; what it comes to, which is put down as well.

        LearningError if it can't be done; ExpertmeshError if workers are lost too often.
        """
        from actors.training_job import run_here

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
        from actors.expert_training import divergence
        from actors.text_routing import choices
        from actors.trainable_version import open_encoder
        from actors.training_job import open_job

        self.progress("the gate", 0.0)
        encode = open_encoder(self.checkpoint)
        judged = {name: _for_gate(records, encode, seed) for name, records in held.items()}
        model, chosen = open_job(job, self.files(job.name))
        chosen.load(saved["training"]["masters"])
        # What is judged is what will serve, and not what was still finer.
        chosen.round_to(self.checkpoint)
        known = [tokens for name in held if name != domain for _, tokens in judged[name]]
        with chosen.as_before():
            before = choices(model, known)
        verdict = judge(
            domain,
            self._compared(model, chosen, judged),
            self.gate,
            divergence=divergence(model, chosen, known),
            imbalance=_imbalance(before, choices(model, known)),
        )
        share = chosen.share
        manifest = self._publish(model, chosen, job, domain, verdict, created) if verdict.passed else ""
        del model, chosen
        gc.collect()
        return Judgement(verdict, share, manifest)

    def _publish(
        self,
        model: Any,
        chosen: ChosenExperts,
        job: TrainingJob,
        domain: str,
        verdict: GateVerdict,
        created: float | None,
    ) -> str:
        from safetensors.torch import save_file

        from actors.router_review import router_tensors

        tensors = chosen.tensors(self.checkpoint)
        if job.clones:
            tensors |= router_tensors(model, self.checkpoint, {layer for layer, _ in job.clones})
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

    def _compared(
        self, model: Any, chosen: ChosenExperts, judged: Mapping[str, Sequence[tuple[str, list[int]]]]
    ) -> dict[str, list[Judged]]:
        """Bits of every held-out text, by the version before and by what was learnt."""
        from actors.expert_training import bits_of

        found: dict[str, list[Judged]] = {}
        count, done = 2 * sum(map(len, judged.values())), 0

        def bits(tokens: list[int]) -> float:
            nonlocal done
            done += 1
            self.progress("the gate", done / count)
            return bits_of(model, tokens)

        for name, texts in judged.items():
            with chosen.as_before():
                before = [bits(tokens) for _, tokens in texts]
            after = [bits(tokens) for _, tokens in texts]
            found[name] = [
                Judged(len(text.encode()), one, other)
                for (text, _), one, other in zip(texts, before, after, strict=True)
            ]
        return found

    def _made(self, fraction: float) -> None:
        """A step was made in this process, which waits where it is to."""
        self.progress("training", fraction)
        while self.pausing():
            time.sleep(_PAUSE_S)

    def _own(self, parent: str) -> str:
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


def _for_gate(records: Sequence[Record], encode: Encode, seed: int) -> list[tuple[str, list[int]]]:
    """Texts with their tokens."""
    picked = random.Random(seed).sample(list(records), min(_MOST_JUDGED, len(records)))
    found = [(record.text, encode(record.text)) for record in picked]
    return [(text, tokens[:_JUDGED_TOKENS]) for text, tokens in found if len(tokens) > 1]


def _imbalance(before: Mapping[int, Sequence[int]], after: Mapping[int, Sequence[int]]) -> float:
    """The largest rise of a layer's largest share, as a factor."""
    return max(
        (max(after[layer]) / sum(after[layer])) / (max(before[layer]) / sum(before[layer]))
        for layer in before
    )
