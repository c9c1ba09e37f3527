"""The configuration's part on learning: what is kept of requests, from whom, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationInfo, field_validator

from cluster.cache_folder import cache_folder
from cluster.config_mistakes import BadValue
from cluster.config_values import (
    SECTION,
    ApiKeys,
    Count,
    Duration,
    Fraction,
    GroupName,
    Name,
    NonNegative,
    Positive,
)


class CaptureConfig(BaseModel):
    """What is kept of requests. Without ``keys`` or ``without_key`` nothing is.

    ``keys``: API keys whose owners agreed; ``without_key``: also requests that need none; ``share``: of their requests;
    ``consent``: on what ground, written into every record; ``domain``: what they are counted as.
    """

    model_config = SECTION

    keys: ApiKeys = ()
    without_key: bool = False
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    consent: Name | None = None
    domain: GroupName = "traffic"
    shard_records: Count = 256
    shard_age: Duration = 60.0

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return bool(self.keys) or self.without_key


class TrainingConfig(BaseModel):
    """How experts are trained, and by whom.

    ``reach``: part of what a domain asks for more that the chosen experts make up, per layer; ``most``: of all weights
    that one round trains; ``counted``: tokens of the new samples, and of what is known, that experts are chosen by;
    ``clones``: experts that a layer may get beside its own, copies of those that what is known needs as they are;
    ``select``: share of the new samples that is learnt, those that the model is least sure of; ``need``: share of
    replayed rows that are of domains that became worse; ``beta``, ``hold``: the pull towards the version before, on new
    and on replayed rows; ``review``: share of the steps, the last ones, in which routers alone learn; ``workers``:
    processes of Ray Train, 0 for none but the command's own; ``max_workers``: as many of them as are possible, up to
    this; ``parallel``: what they divide; ``teacher``: folder of a larger model to learn from as well, and how much.
    """

    model_config = SECTION

    reach: Annotated[float, Field(gt=0, le=1)] = 0.2
    most: Annotated[float, Field(gt=0, le=1)] = 0.15
    counted: Count = 20_000
    clones: Annotated[int, Field(ge=0)] = 0
    select: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps: Count = 100
    rows: Annotated[int, Field(ge=2)] = 8
    length: Annotated[int, Field(ge=2)] = 128
    replay: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    need: Annotated[float, Field(ge=0, le=1)] = 0.75
    rate: Positive = 1e-3
    beta: NonNegative = 0.05
    hold: NonNegative = 1.0
    review: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    review_rate: Positive = 1e-3
    balance: NonNegative = 0.01
    bias_rate: NonNegative = 1e-3
    bfloat16: bool = False
    keep_every: Count = 20
    workers: Annotated[int, Field(ge=0)] = 1
    max_workers: Annotated[int, Field(ge=1)] | None = None
    parallel: Literal["rows", "experts", "sharded"] = "rows"
    threads: Count = 1
    cpus: Positive = 0.01
    labels: dict[str, str] = {}
    max_failures: Annotated[int, Field(ge=0)] = 3
    gentle: bool = True
    teacher: str = ""
    teacher_weight: NonNegative = 1.0
    teacher_temperature: Positive = 2.0
    teacher_features: NonNegative = 0.0

    @field_validator("max_workers")
    @classmethod
    def _not_fewer(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("workers")
        if most is not None and least is not None and not 1 <= least <= most:
            raise BadValue(f"is below workers, {least}" if least else "needs at least one of workers")
        return most


class GateConfig(BaseModel):
    """What is asked of what was learnt before it is published.

    ``level``: of the one-sided bounds; ``most_rise``: of a known domain's bits per byte, as a share;
    ``most_divergence``: from the version before, nats per token of known text; ``most_imbalance``: factor by which the
    largest share of a layer that one expert gets may rise; ``most_touched``: factor by which the experts that a step
    reads may become more, since they bound the time between tokens; ``fewest`` and ``texts``: held-out texts of each
    domain that are read, at least and at most; ``tokens``: of each.
    """

    model_config = SECTION

    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    most_rise: NonNegative = 0.01
    most_divergence: Positive = 0.5
    most_imbalance: Annotated[float, Field(ge=1)] = 1.5
    most_touched: Annotated[float, Field(ge=1)] = 1.25
    fewest: Annotated[int, Field(ge=2)] = 8
    texts: Annotated[int, Field(ge=2)] = 48
    tokens: Annotated[int, Field(ge=2)] = 256

    @field_validator("texts")
    @classmethod
    def _enough(cls, texts: int, info: ValidationInfo) -> int:
        fewest = info.data.get("fewest")
        if fewest is not None and texts < fewest:
            raise BadValue(f"is below fewest, {fewest}")
        return texts


class DriftConfig(BaseModel):
    """Whether what serves gets worse, and what then.

    ``every``: how often ``learn serve`` looks, ``null`` for never; ``slack``: rise of a domain's bits per byte, as a
    share, that is tolerable; ``false_alarms``: of all texts that are read, at most; ``warm``: live texts whose mean is
    what later ones are held against; ``texts``: held-out ones and live ones of a domain that one look reads at most;
    ``update``: whether an alarm begins a round of its domain.
    """

    model_config = SECTION

    every: Duration | None = 600.0
    slack: NonNegative = 0.02
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    warm: Annotated[int, Field(ge=2)] = 128
    texts: Count = 16
    update: bool = False


class BanditConfig(BaseModel):
    """How requests are shared out among versions by what they earn, once ``learn bandit`` has begun it.

    ``every``: how often ``learn serve`` looks, ``null`` for never; ``floor``: probability with which a request gets any
    of the versions, at least; ``alpha``: probability that a version is promoted that earns no more; ``level``: of the
    intervals; ``fewest``: requests with feedback of each version without which none is promoted; ``promote``: whether
    what passes is promoted, or only named.
    """

    model_config = SECTION

    every: Duration | None = 60.0
    floor: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    fewest: Annotated[int, Field(ge=2)] = 50
    promote: bool = True


class LearningConfig(BaseModel):
    """What the mesh learns from, and when.

    ``stream``: folder or URL of the shards; ``retention``: seconds for which they are kept; ``holdout``: share of all
    samples that is never learnt from, of which ``holdout_parts`` take turns in judging; ``state``: folder or URL of a
    loop's journal and trainings; ``known``: domains that the model knew before; ``least``: new samples that begin a
    round, or fewer after ``age``; ``pause_above``: requests in the server above which training waits; ``tensorboard``:
    folder or URL of curves.
    """

    model_config = SECTION

    stream: str = ""
    options: dict[str, Any] = {}
    retention: Duration = 30 * 86400.0
    holdout: Fraction = 0.1
    holdout_parts: Count = 4
    state: str = ""
    known: tuple[Name, ...] = ()
    least: Count = 64
    age: Duration = 3600.0
    reservoir: Count = 2000
    pause_above: NonNegative = 4.0
    canary: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.05, 0.25, 1.0)
    canary_every: Duration = 60.0
    canary_give_up: Duration = 86400.0
    capture: CaptureConfig = CaptureConfig()
    tensorboard: str = ""
    training: TrainingConfig = TrainingConfig()
    gate: GateConfig = GateConfig()
    drift: DriftConfig = DriftConfig()
    bandit: BanditConfig = BanditConfig()

    @field_validator("canary")
    @classmethod
    def _ascending(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares or list(shares) != sorted(set(shares)):
            raise BadValue("should be shares that ascend, such as [0.05, 0.25, 1.0]")
        return shares

    @field_validator("capture")
    @classmethod
    def _on_a_ground(cls, capture: CaptureConfig) -> CaptureConfig:
        if capture.on and not capture.consent:
            raise BadValue(
                "requests are to be kept, and it is not said on what ground",
                "say it, such as: consent: terms of 2026-10-01, section 4",
                path=("learning", "capture", "consent"),
            )
        return capture

    def url(self, model: str) -> str:
        """The stream of the model with this checkpoint digest, for processes with other working folders as well."""
        return _place(self.stream, "stream", model)

    def state_url(self, model: str) -> str:
        """The same of a loop's state."""
        return _place(self.state, "learning", model)

    def state_urls(self) -> list[str]:
        """Of all loops there may be: of the configured one, else of every model's."""
        if self.state:
            return [self.state_url("")]
        return [str(folder) for folder in sorted((cache_folder() / "learning").glob("*"))]


def _place(given: str, folder: str, model: str) -> str:
    if not given:
        return str(cache_folder() / folder / model[:16])
    return given if "://" in given else str(Path(given).expanduser().absolute())


def unknown_keys(capture: CaptureConfig, known: tuple[SecretStr, ...]) -> int:
    """How many of the keys are none of the server's."""
    texts = {key.get_secret_value() for key in known}
    return sum(key.get_secret_value() not in texts for key in capture.keys)
