"""The placement table: which hosts hold which expert, of one manifest, at one epoch.

Immutable. A change is a new table with the next epoch number, used from the next step on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from cluster.errors import PlacementError, ProtocolError
from cluster.live_versions import LiveVersions
from cluster.messages import HostAddress, HostCost, MoeLayer
from cluster.placement import Plan
from cluster.turns import first_asked

_VERSION: Final = 1


@dataclass(frozen=True)
class PlacementTable:
    """(layer, expert) → hosts. Equal tables are equal in everything, addresses included."""

    manifest: str
    epoch: int
    hosts: Mapping[str, HostAddress | None]
    """Every host by id; ``None`` for one that isn't running."""
    experts: Mapping[int, tuple[tuple[str, ...], ...]]
    """Layer index → per expert the hosts that hold it, the one to ask first in front."""
    costs: Mapping[str, HostCost] = field(default_factory=dict)
    """Of hosts that were measured."""
    versions: LiveVersions = field(default_factory=LiveVersions)
    """What engines may ask these hosts for; `manifest` names the base checkpoint."""

    @classmethod
    def from_plan(
        cls, plan: Plan, manifest: str, epoch: int = 0, versions: LiveVersions | None = None
    ) -> PlacementTable:
        """The table of a plan whose hosts aren't running yet.

        An expert's hosts take turns in being asked first, or those in front would do all the work and the
        copies none: of every layer, each is asked first for a share that is in proportion to all it holds.
        """
        names = list(plan.assignments)
        weights = list(plan.experts_by_host.values())
        experts = {}
        for layer in plan.layers:
            holders: list[list[int]] = [[] for _ in range(layer.num_experts)]
            for position, held in enumerate(plan.assignments.values()):
                for expert in held.get(layer.index, ()):
                    holders[expert].append(position)
            experts[layer.index] = _by_turns(holders, names, weights)
        return cls(
            manifest,
            epoch,
            dict.fromkeys(plan.assignments),
            experts,
            versions=LiveVersions() if versions is None else versions,
        )

    def next_epoch(
        self, *, hosts: Mapping[str, HostAddress | None] | None = None, manifest: str | None = None
    ) -> PlacementTable:
        """This table one epoch on, with other addresses for the given hosts, or another manifest.

        Raises PlacementError for a host that the table does not have.
        """
        changed = dict(self.hosts)
        for host_id, address in (hosts or {}).items():
            if host_id not in changed or (address is not None and address.host_id != host_id):
                raise PlacementError(
                    f"host {host_id} is not in the placement table", f"its hosts: {', '.join(changed)}"
                )
            changed[host_id] = address
        return replace(self, epoch=self.epoch + 1, hosts=changed, manifest=manifest or self.manifest)

    @cached_property
    def running(self) -> tuple[HostAddress, ...]:
        """Addresses of the running hosts, in the table's order: what `host_matrix` counts in."""
        return tuple(address for address in self.hosts.values() if address is not None)

    @cached_property
    def digest(self) -> str:
        """Names the whole content in 16 hexadecimal digits: two tables of one epoch that differ are a mistake."""
        return sha256(self.to_json().encode()).hexdigest()[:16]

    def replicas(self, layer: int, expert: int) -> tuple[str, ...]:
        """Ids of the hosts that hold the expert, running or not, the one to ask first in front."""
        return self.experts[layer][expert]

    def host_matrix(self, layer: int) -> list[int]:
        """Per expert the position in `running` of the first of its hosts that runs, -1 if none does."""
        position = {address.host_id: index for index, address in enumerate(self.running)}
        return [
            next((position[host] for host in hosts if host in position), -1) for hosts in self.experts[layer]
        ]

    def complete(self, layers: Iterable[MoeLayer]) -> list[tuple[int, int]]:
        """(layer, expert) of these layers that no running host holds; empty if all can be served."""
        return [
            (layer.index, expert)
            for layer in layers
            for expert in range(layer.num_experts)
            if not any(self.hosts[host] for host in self._holders(layer.index, expert))
        ]

    def to_json(self) -> str:
        """The table as JSON; hosts are written once and counted in."""
        position = {host_id: index for index, host_id in enumerate(self.hosts)}
        experts = {
            layer: [[position[host] for host in hosts] for hosts in rows]
            for layer, rows in self.experts.items()
        }
        return _TableJson(
            version=_VERSION,
            manifest=self.manifest,
            epoch=self.epoch,
            hosts=dict(self.hosts),
            experts=experts,
            costs=dict(self.costs),
            versions=self.versions,
        ).model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> PlacementTable:
        """Read :meth:`to_json`'s text; ProtocolError if it is of another version or malformed."""
        try:
            wire = _TableJson.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            if first["loc"] == ("version",):
                raise ProtocolError(
                    f"placement table of version {first['input']!r:.20}, this process reads {_VERSION}",
                    "run the same expertmesh version on every node",
                ) from None
            place = ".".join(map(str, first["loc"])) or "text"
            raise ProtocolError(f"malformed placement table: {place}: {first['msg']}") from None
        names = tuple(wire.hosts)
        for host_id, address in wire.hosts.items():
            if address is not None and address.host_id != host_id:
                raise ProtocolError(
                    f"malformed placement table: host {host_id} with {address.host_id}'s address"
                )
        for layer, rows in wire.experts.items():
            for expert, positions in enumerate(rows):
                if len(set(positions)) < max(1, len(positions)) or any(p >= len(names) for p in positions):
                    raise ProtocolError(
                        f"malformed placement table: layer {layer}, expert {expert}: {positions}"
                    )
        experts = {
            layer: tuple(tuple(names[p] for p in positions) for positions in rows)
            for layer, rows in wire.experts.items()
        }
        return cls(wire.manifest, wire.epoch, wire.hosts, experts, wire.costs, wire.versions)

    def _holders(self, layer: int, expert: int) -> tuple[str, ...]:
        rows = self.experts.get(layer, ())
        return rows[expert] if expert < len(rows) else ()


def in_turn(
    before: Sequence[Sequence[str]],
    holders: Sequence[Sequence[int]],
    names: Sequence[str],
    weights: Sequence[int],
) -> tuple[tuple[str, ...], ...]:
    """Per expert of a layer its hosts, the one to ask first in front; `before` itself where they are the same ones.

    `holders` are positions in `names`; `weights` say how much of the work a host should get.
    """
    if [set(hosts) for hosts in before] == [{names[position] for position in hosts} for hosts in holders]:
        return tuple(map(tuple, before))
    return _by_turns(holders, names, weights)


def _by_turns(
    holders: Sequence[Sequence[int]], names: Sequence[str], weights: Sequence[int]
) -> tuple[tuple[str, ...], ...]:
    rows = []
    for hosts, first in zip(holders, first_asked(holders, weights), strict=True):
        turn = list(hosts).index(first)
        rows.append(tuple(names[position] for position in (*hosts[turn:], *hosts[:turn])))
    return tuple(rows)


class _TableJson(BaseModel):
    # Not strict: JSON has no integer keys. `version` comes first, so that its error does.
    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    manifest: str
    epoch: NonNegativeInt
    hosts: dict[str, HostAddress | None]
    experts: dict[NonNegativeInt, list[list[NonNegativeInt]]]
    costs: dict[str, HostCost] = {}
    versions: LiveVersions = LiveVersions()
