"""A training job: what is to be trained on what, put down where all its workers find it.

    jobs/NAME/new, old    samples, as shards of the stream are written
    jobs/NAME/rows        rows of routers, of the experts that are cloned
    jobs/NAME/job         the job; written last, so that whoever finds it finds its samples
    jobs/NAME/progress    how far it is
    jobs/NAME/pause       there for as long as it is to wait

A job that is begun again under its name goes on with what was put down, whatever is asked for by then.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save

from actors.distillation import TeacherSettings
from actors.expert_training import Trained, TrainSettings
from actors.training_rows import RowSettings
from cluster.learning.records import Record, from_parquet, to_parquet
from cluster.messages import StoreAddress
from cluster.versions.files import Files


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
