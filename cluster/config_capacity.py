"""The configuration's part on capacity: how many rows an expert takes in a step, and what becomes of the others."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ValidationInfo, field_validator

from cluster.config_mistakes import BadValue
from cluster.config_values import SECTION, Count, Fraction, NonNegative, Positive
from cluster.messages import CapacitySettings

_BELOW = ("placement", "capacity")


class CapacityConfig(BaseModel):
    """Rows per expert and step: base × (1 + coefficient × load); see `cluster.capacity`."""

    model_config = SECTION

    policy: Literal["dropless", "reroute", "defer", "drop"] = "dropless"
    factor: Positive = 1.25
    min_rows: Count = 4
    coefficient: NonNegative = 1.0
    coefficient_min: NonNegative = 0.0
    coefficient_max: NonNegative = 8.0
    target: Fraction = 0.01

    @field_validator("coefficient_max")
    @classmethod
    def _order(cls, largest: float, info: ValidationInfo) -> float:
        low, start = info.data.get("coefficient_min"), info.data.get("coefficient")
        if low is None or start is None:
            return largest
        if low > largest:
            raise BadValue(
                f"is below coefficient_min, {low:g}", "raise it, or lower placement.capacity.coefficient_min"
            )
        if not low <= start <= largest:
            raise BadValue(
                f"{start:g} is not between coefficient_min, {low:g}, and coefficient_max, {largest:g}",
                "start between the two, or move them",
                path=(*_BELOW, "coefficient"),
            )
        return largest

    def settings(self) -> CapacitySettings:
        """What the engine is told."""
        return CapacitySettings(**self.model_dump())
