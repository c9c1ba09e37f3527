"""The configuration's part on autoscaling: how many hosts a group may have, and by what that is decided."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ValidationInfo, field_validator

from cluster.config_mistakes import BadValue
from cluster.config_values import SECTION, Count, Duration, Share, positive_number


class AutoscaleConfig(BaseModel):
    """Bounds, targets and pauses of one host group; `cluster.autoscale` says what is made of them."""

    model_config = SECTION

    min: Count
    max: Count
    utilisation: Share = Decimal("0.6")
    queue: Annotated[Decimal, BeforeValidator(positive_number)] | None = Decimal("1")
    memory: Share | None = None
    up_cooldown: Duration = 30.0
    down_cooldown: Duration = 300.0

    @field_validator("max")
    @classmethod
    def _not_below_min(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min")
        if least is not None and most < least:
            raise BadValue(f"is below min, which is {least}", "raise max, or lower min")
        return most
