"""The configuration's part on placement: how many copies of which experts, and where they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, TypeAdapter

from cluster.config_capacity import CapacityConfig
from cluster.config_sources import KeyPath
from cluster.config_values import SECTION, Count, LayerIndex, Name, Share


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


class PlacementConfig(_Section):
    """Which expert goes to which host."""

    strategy: Literal["balanced"] = "balanced"
    replicas: Annotated[int | ReplicaRules, BeforeValidator(_replicas)] = 1
    spread: Literal["node", "host"] = "node"
    no_replica: Literal["fail", "reroute", "drop"] = "fail"
    capacity: CapacityConfig = CapacityConfig()

    @property
    def rules(self) -> ReplicaRules:
        """``replicas``, a plain number as a rule for all."""
        return ReplicaRules(default=self.replicas) if isinstance(self.replicas, int) else self.replicas
