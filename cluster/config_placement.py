"""The configuration's part on placement: how many copies of which experts, and where they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, model_validator

from cluster.config_capacity import CapacityConfig
from cluster.config_mistakes import BadValue
from cluster.config_sources import KeyPath
from cluster.config_values import (
    SECTION,
    Count,
    Duration,
    ExpertIndex,
    LayerIndex,
    Name,
    Share,
    Size,
    parse_size,
)


class _Section(BaseModel):
    model_config = SECTION


class HottestExperts(_Section):
    """More copies for the ``share`` of every layer's experts that the file ``counts`` says are chosen most."""

    share: Share
    replicas: Count
    counts: Name


class ReplicaRules(_Section):
    """Copies of each expert where not all have equally many: the largest number that any rule gives it."""

    default: Count = 1
    layers: dict[LayerIndex, Count] = {}
    hottest: HottestExperts | None = None

    def numbers(self) -> Iterator[tuple[KeyPath, int]]:
        """Every number of copies that is asked for, with its key path below ``placement.replicas``."""
        yield ("default",), self.default
        for layer, copies in self.layers.items():
            yield ("layers", str(layer)), copies
        if self.hottest is not None:
            yield ("hottest", "replicas"), self.hottest.replicas


_COUNT: Final = TypeAdapter[int](Count)


def _replicas(value: object) -> int | ReplicaRules:
    # Before pydantic's union, which would report the mistakes of both kinds, under paths that no file has.
    if isinstance(value, Mapping | ReplicaRules):
        return ReplicaRules.model_validate(value)
    return _COUNT.validate_python(value)


class RebalanceConfig(_Section):
    """When a placement is changed while it serves: by itself, or only by `expertmesh rebalance`.

    ``min_gain``: share of the predicted time of the experts that a change must save; ``bandwidth``: bytes a second at
    which a host loads what is moved to it; ``max_moves``: most experts that one change moves.
    """

    mode: Literal["auto", "manual"] = "auto"
    interval: Duration = 30.0
    min_gain: Share = Decimal("0.05")
    bandwidth: Size = parse_size("256MiB")
    max_moves: Count | None = None


class PinConfig(_Section):
    """Ties experts to hosts of a device class or a group, or on nodes with certain labels.

    ``layers``: decoder layers counted from 0; all if it is empty. ``selector``: labels in Ray's notation.
    """

    layers: tuple[LayerIndex, ...] = ()
    experts: Annotated[tuple[ExpertIndex, ...], Field(min_length=1)]
    device: Literal["cpu", "cuda"] | None = None
    group: Name | None = None
    selector: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_hosts(self) -> Self:
        if self.device is None and self.group is None and not self.selector:
            raise BadValue("a pin says where its experts may be", "give it a device, a group or a selector")
        return self


class PlacementConfig(_Section):
    """Which expert goes to which host."""

    strategy: Literal["balanced"] = "balanced"
    replicas: Annotated[int | ReplicaRules, BeforeValidator(_replicas)] = 1
    spread: Literal["node", "host"] = "node"
    redundancy: Annotated[float, Field(ge=1, le=1024)] = 1.0
    pins: tuple[PinConfig, ...] = ()
    rebalance: RebalanceConfig = RebalanceConfig()
    no_replica: Literal["fail", "reroute", "drop"] = "fail"
    capacity: CapacityConfig = CapacityConfig()

    @property
    def rules(self) -> ReplicaRules:
        """``replicas``, a plain number as a rule for all."""
        return ReplicaRules(default=self.replicas) if isinstance(self.replicas, int) else self.replicas
