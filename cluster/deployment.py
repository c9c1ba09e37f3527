"""What is to run, and the document that outlives the controller that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from cluster.messages import HostSpec
from cluster.rehome import Limits
from cluster.repair_state import Repair, rebased
from cluster.table import PlacementTable


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is to run: the hosts with their experts, and the empty-addressed table that routes to them."""

    served_name: str
    hosts: tuple[HostSpec, ...]
    """As planned; where a lost one was placed instead is in `Controller.states`."""
    table: str
    """JSON of the planned table; its addresses are filled in as hosts come up."""
    limits: Limits = field(default_factory=Limits)
    """Where hosts may be placed when their node is gone."""

    def same(self, other: Deployment) -> bool:
        """Whether they are to run the same; their tables differ by the addresses that were filled in."""
        return (self.served_name, self.hosts) == (other.served_name, other.hosts)


@dataclass(frozen=True, slots=True)
class _Document:
    deployment: Deployment
    repair: Repair
    at: float
    """By the clock of the controller that saved it."""


_DOCUMENT = TypeAdapter(_Document)


def to_document(deployment: Deployment, state: Repair, now: float) -> bytes:
    """What a controller's successor needs."""
    return _DOCUMENT.dump_json(_Document(deployment, replace(state, nodes=None), now))


def from_document(document: bytes, now: float) -> tuple[Deployment, Repair]:
    """The same by the successor's clock."""
    saved = _DOCUMENT.validate_json(document)
    return saved.deployment, rebased(saved.repair, now - saved.at)


def complete(table: PlacementTable) -> bool:
    """Whether some running host has each expert that is placed at all."""
    return all(
        not holders or any(table.hosts[host_id] for host_id in holders)
        for rows in table.experts.values()
        for holders in rows
    )
