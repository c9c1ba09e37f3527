"""The configuration's part on learning: what is kept of requests, from whom, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    that one round trains; ``clones``: experts that a layer may get beside its own, copies of those that what is known
    needs as they are; ``beta``, ``hold``: the pull towards the version before, on new and on replayed rows; ``need``:
    share of replayed rows that are of domains that became worse; ``workers``: processes of Ray Train, 0 for none but
    the command's own; ``max_workers``: as many of them as are possible, up to this.
    """

    model_config = SECTION

    reach: Annotated[float, Field(gt=0, le=1)] = 0.2
    most: Annotated[float, Field(gt=0, le=1)] = 0.15
    clones: Annotated[int, Field(ge=0)] = 0
    steps: Count = 100
    rows: Annotated[int, Field(ge=2)] = 8
    length: Annotated[int, Field(ge=2)] = 128
    replay: Annotated[float, Field(ge=0, le=0.9)] = 0.25
    need: Annotated[float, Field(ge=0, le=1)] = 0.75
    rate: Positive = 1e-3
    beta: NonNegative = 0.05
    hold: NonNegative = 1.0
    bfloat16: bool = False
    keep_every: Count = 20
    workers: Annotated[int, Field(ge=0)] = 1
    max_workers: Annotated[int, Field(ge=1)] | None = None
    threads: Count = 1
    cpus: Positive = 0.01
    labels: dict[str, str] = {}
    max_failures: Annotated[int, Field(ge=0)] = 3
    gentle: bool = True

    @field_validator("max_workers")
    @classmethod
    def _not_fewer(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("workers")
        if most is not None and least is not None and not 1 <= least <= most:
            raise BadValue(f"is below workers, {least}" if least else "needs at least one of workers")
        return most


class LearningConfig(BaseModel):
    """What the mesh learns from, and when.

    ``stream``: folder or URL of the shards; ``retention``: seconds for which they are kept; ``holdout``: share of all
    samples that is never learnt from, of which ``holdout_parts`` take turns in judging; ``state``: folder or URL of a
    loop's journal and trainings; ``known``: domains that the model knew before; ``least``: new samples that begin a
    round, or fewer after ``age``; ``pause_above``: requests in the server above which training waits.
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
    training: TrainingConfig = TrainingConfig()

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
