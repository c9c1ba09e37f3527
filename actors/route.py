"""What one step needs of the placement table, and who answers for which expert while some hosts are out.

A host is asked, suspected (it owes an answer, and is asked only for what nobody else holds), or out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cluster.live_versions import LiveVersions, dead_numbers
from cluster.messages import HostAddress, HostCost
from cluster.table import PlacementTable

NOBODY = -1
"""In place of a host: no running host holds the expert. In place of an expert: none is wanted."""

Replicas = tuple[tuple[int, ...], ...]
"""Per expert the positions of the hosts that hold it, the one to ask first in front."""


class Held(NamedTuple):
    """Some experts of one layer that a host holds, by their numbers."""

    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """A placement table's running hosts and, per layer, where each expert's replicas are among them."""

    manifest: str
    epoch: int
    hosts: tuple[HostAddress, ...]
    replicas: Mapping[int, Replicas]
    """Layer index → by number (see `cluster.live_versions`), even of those that nobody may ask for."""
    digest: str = ""
    """Of the table that it was made of."""
    costs: tuple[HostCost, ...] = ()
    """Of each host, as it was measured; none where not all were."""
    versions: LiveVersions = field(default_factory=LiveVersions)
    dead: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Layer index → numbers that nobody may ask for."""

    @property
    def sizes(self) -> dict[int, int]:
        """Layer index → experts of the base checkpoint."""
        return {
            layer: len(rows) - len(self.versions.variants.get(layer, ()))
            for layer, rows in self.replicas.items()
        }

    @property
    def replicated(self) -> bool:
        """Whether any expert has more than one replica."""
        return any(len(hosts) > 1 for experts in self.replicas.values() for hosts in experts)

    def held_by(self, position: int) -> Held | None:
        """The first layer of which the host holds experts, and those; None if it holds none."""
        for layer, experts in self.replicas.items():
            dead = self.dead.get(layer, frozenset())
            held = tuple(
                number for number, hosts in enumerate(experts) if position in hosts and number not in dead
            )
            if held:
                return Held(layer, held)
        return None


class Owners(NamedTuple):
    """One layer's answer to who is asked for which expert.

    Both have one entry more than there are experts, NOBODY: what the id -1 finds, counted from the end.
    """

    array: np.ndarray
    """int16 [E + 1]."""
    listed: list[int]
    complete: bool
    """Whether every expert has an owner."""


def owners(replicas: Replicas, asked: Collection[int], suspected: Collection[int]) -> Owners:
    """Each expert's first host that is asked, else its first that is suspected, else NOBODY."""
    listed = []
    for hosts in replicas:
        owner = next((host for host in hosts if host in asked), NOBODY)
        if owner == NOBODY:
            owner = next((host for host in hosts if host in suspected), NOBODY)
        listed.append(owner)
    complete = NOBODY not in listed
    listed.append(NOBODY)
    return Owners(np.array(listed, np.int16), listed, complete)


def fixed_route(
    manifest: str,
    epoch: int,
    hosts: Sequence[HostAddress],
    replicas: Mapping[int, Sequence[int | Sequence[int]]],
) -> Route:
    """A route from plain lists: per layer and expert the position of its host in `hosts`, or those of several."""
    rows = {
        layer: tuple((entry,) if isinstance(entry, int) else tuple(entry) for entry in experts)
        for layer, experts in replicas.items()
    }
    return Route(manifest, epoch, tuple(hosts), rows)


def route_from_table(table: PlacementTable) -> Route:
    """The running hosts of a table and their experts; an expert without one has no replicas here."""
    position = {address.host_id: index for index, address in enumerate(table.running)}
    replicas = {}
    for layer, experts in table.experts.items():
        rows = tuple(tuple(position[host] for host in hosts if host in position) for hosts in experts)
        variants = table.versions.variants.get(layer, ())
        replicas[layer] = rows + tuple(rows[variant.expert] for variant in variants)
    costs = tuple(table.costs[a.host_id] for a in table.running if a.host_id in table.costs)
    measured = costs if len(costs) == len(table.running) else ()
    dead = {
        layer: dead_numbers(table.versions, layer, len(experts)) for layer, experts in table.experts.items()
    }
    versions = table.versions
    return Route(table.manifest, table.epoch, table.running, replicas, table.digest, measured, versions, dead)
