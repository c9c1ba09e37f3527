"""The configuration's part on learning: what is kept of requests, from whom, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, SecretStr, field_validator

from cluster.cache_folder import cache_folder
from cluster.config_mistakes import BadValue
from cluster.config_values import SECTION, ApiKeys, Count, Duration, Fraction, GroupName, Name


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


class LearningConfig(BaseModel):
    """What the mesh learns from.

    ``stream``: folder or URL of the shards; ``retention``: seconds for which they are kept; ``holdout``: share of all
    samples that is never learnt from.
    """

    model_config = SECTION

    stream: str = ""
    options: dict[str, Any] = {}
    retention: Duration = 30 * 86400.0
    holdout: Fraction = 0.1
    capture: CaptureConfig = CaptureConfig()

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
        if not self.stream:
            return str(cache_folder() / "stream" / model[:16])
        return self.stream if "://" in self.stream else str(Path(self.stream).expanduser().absolute())


def unknown_keys(capture: CaptureConfig, known: tuple[SecretStr, ...]) -> int:
    """How many of the keys are none of the server's."""
    texts = {key.get_secret_value() for key in known}
    return sum(key.get_secret_value() not in texts for key in capture.keys)
