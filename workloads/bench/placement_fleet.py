"""The fleets that placements are compared on: equal hosts, or those that a YAML file describes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ConfigError
from cluster.fleet import FleetHost, HostCost

ROW_S = 1e-6
"""Seconds that a host of speed 1 takes for a row."""


class _Group(BaseModel):
    """Hosts of one kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    count: Annotated[int, Field(ge=1)]
    slots: Annotated[int, Field(ge=1)]
    """Blobs of every layer that a host has room for."""
    speed: Annotated[float, Field(gt=0)] = 1.0
    """Of one that takes a microsecond for a row."""
    expert_rows: Annotated[float, Field(ge=0)] = 0.0
    """What touching an expert costs, in rows: the reading of its weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    zone: str = ""


class _Fleet(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: Annotated[tuple[_Group, ...], Field(min_length=1)]


def equal_hosts(number: int, slots: int, layers: int) -> list[FleetHost]:
    """Hosts of speed 1 with room for so many blobs, of one byte each, of every layer."""
    return [FleetHost(f"host-{n}", slots * layers, HostCost(per_row_s=ROW_S)) for n in range(number)]


def slots_of(experts: int, redundancy: float, hosts: int) -> int:
    """Slots of a layer on each of equal hosts: rounded up, and never more than there are experts."""
    return min(ceil(experts * redundancy / hosts - 1e-9), experts)


def read_fleet(file: Path, layers: int) -> list[FleetHost]:
    """The hosts that a YAML file describes; ConfigError if it can't be read or makes no sense."""
    way_out = "groups: [{name: gpu, count: 2, slots: 12, speed: 16}, ...]"
    try:
        groups = _Fleet.model_validate(yaml.safe_load(file.read_text("utf-8"))).groups
    except OSError as error:
        raise ConfigError(f"--fleet {file} can't be read: {error.strerror}", way_out) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--fleet {file} is no YAML: {error}", way_out) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"--fleet {file}: {place}: {first['msg']}", way_out) from error
    return [
        FleetHost(
            f"{group.name}-{n}",
            group.slots * layers,
            HostCost(per_expert_s=group.expert_rows * ROW_S / group.speed, per_row_s=ROW_S / group.speed),
            group=group.name,
            node=f"{group.name}-{n}",
            zone=group.zone,
            device=group.device,
        )
        for group in groups
        for n in range(group.count)
    ]


def equal_speeds(hosts: Sequence[FleetHost]) -> bool:
    """Whether all hosts take the same time for the same work."""
    return len({host.cost for host in hosts}) == 1
