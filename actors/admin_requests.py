"""What the admin API is sent, as it is checked before anything is done."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from cluster.config_values import parse_duration

_Seconds = Annotated[float, PlainValidator(parse_duration, json_schema_input_type=str | float)]
_Share = Annotated[float, Field(gt=0, le=1)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Canary(_Body):
    """A version gets a share of requests first, until it is clear whether it is good enough."""

    shares: Annotated[tuple[_Share, ...], Field(min_length=1)]
    """Of new requests, ascending."""
    every: _Seconds = 600.0
    """How long each share lasts at least."""
    alpha: Annotated[float, Field(ge=1e-9, le=0.5)] = 0.01
    """How probable a wrong verdict may be."""


class Rollback(_Body):
    """Who goes back, and what for."""

    author: str = ""
    reason: str = ""


class Promote(Rollback):
    """A version is to serve: at once, or after a trial."""

    running: Literal["finish", "continue"] | None = None
    """Whether running requests end on their version, or go on with this one; as configured if not given."""
    canary: Canary | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Promote:
        if self.canary is not None and self.running is not None:
            raise ValueError("running is nothing for a canary: requests keep the version that they got")
        return self


class Collect(_Body):
    """What may be taken out of the store."""

    dry_run: bool = False
    min_age: _Seconds = 86400.0
    """Nothing younger goes."""
    history: Annotated[int, Field(ge=1)] | None = None
    """Moves of each alias that are kept; as configured if not given."""


class Scale(_Body):
    """A group's number of hosts."""

    hosts: Annotated[int, Field(ge=0)]


class Drain(_Body):
    """A node's hosts are to go elsewhere."""

    reason: Annotated[str, Field(max_length=300)] = ""
    """Shown by `/groups`."""
