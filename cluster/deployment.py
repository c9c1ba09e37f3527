"""What a controller runs, and the one document that it leaves to its successor.

Changes of a deployment are pure functions here; the controller saves what they return before it does anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from cluster.canary import Canary
from cluster.config import HostGroup
from cluster.config_placement import PlacementConfig
from cluster.errors import PlacementError
from cluster.holdings import Holders, by_host
from cluster.live_versions import LiveVersions, variants_of
from cluster.messages import AdminSettings, HostSpec, MoeLayer, StoreAddress
from cluster.promotion import Promotion, Retiring, VersionSettings
from cluster.reconcile import Following, held_by_host
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
    run: str = ""
    """Names this deployment, whatever becomes of its hosts."""
    layers: tuple[MoeLayer, ...] = ()
    item_bytes: int = 4
    """Bytes of one parameter, as the hosts hold it."""
    copies: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer index → copies that each expert must have."""
    groups: tuple[HostGroup, ...] = ()
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    following: Following | None = None
    """The placement that is to come, while hosts load for it."""
    leaving: tuple[str, ...] = ()
    """Hosts that are emptied, and then ended."""
    changes: int = 0
    """Number of the last change of the placement."""
    store: StoreAddress | None = None
    """Of the model's versions."""
    version_settings: VersionSettings = field(default_factory=VersionSettings)
    admin: AdminSettings | None = None
    promotion: Promotion | None = None
    """The one that is being made: a controller that finds it finishes or undoes it."""
    retiring: Mapping[str, Retiring] = field(default_factory=dict)
    """Versions that new requests don't get any more, by manifest."""
    canary: Canary | None = None
    """A version on trial."""
    verdict: str = ""
    """What became of the last trial, and why."""
    nodes: str = "ray"
    """Who brings nodes: ray or operator."""
    evacuated: Mapping[str, str] = field(default_factory=dict)
    """Node id → why its hosts are to go elsewhere, for nodes that are drained by the admin API."""
    wishes: Mapping[str, int] = field(default_factory=dict)
    """Group → hosts that it is to have as soon as there are nodes for them."""

    def same(self, other: Deployment) -> bool:
        """Whether they are to run the same; hosts may have come and gone since."""
        return (self.served_name, self.run) == (other.served_name, other.run)

    @property
    def sizes(self) -> dict[int, int]:
        """Layer index → experts of the base checkpoint."""
        return {layer.index: layer.num_experts for layer in self.layers}

    def spec(self, host_id: str) -> HostSpec:
        """A host's specification."""
        return next(spec for spec in self.hosts if spec.host_id == host_id)

    def group(self, name: str) -> HostGroup:
        """A host group. PlacementError if there is none of that name."""
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups) or "none"
        raise PlacementError(f"there is no host group {name}", f"groups: {known}")


def followed_by(
    deployment: Deployment,
    experts: Mapping[int, tuple[tuple[str, ...], ...]],
    reason: str,
    versions: LiveVersions | None = None,
) -> Deployment:
    """With a placement that is to come; one that was to come before is forgotten."""
    number = deployment.changes + 1
    return replace(deployment, following=Following(number, experts, reason, versions), changes=number)


def flipped(deployment: Deployment) -> Deployment:
    """With the placement that was to come as the current one, one epoch on."""
    assert deployment.following is not None
    table = PlacementTable.from_json(deployment.table)
    experts, versions = deployment.following.experts, table.versions
    if (coming := deployment.following.versions) is not None:
        # Another version may have come to serve meanwhile.
        versions = replace(
            coming,
            serving=versions.serving,
            continued=versions.continued,
            candidate=versions.candidate,
            share=versions.share,
            shares=versions.shares,
        )
    return replace(with_table(deployment, replace(table, experts=experts, versions=versions)), following=None)


def with_table(deployment: Deployment, table: PlacementTable) -> Deployment:
    """With another placement, or other versions, one epoch on; hosts that start anew hold what these name."""
    table = replace(table, epoch=table.epoch + 1)
    hosts = holding(deployment.hosts, table.experts, table.versions, deployment.sizes)
    return replace(deployment, table=table.to_json(), hosts=hosts)


def holding(
    hosts: Sequence[HostSpec], experts: Holders, versions: LiveVersions, sizes: Mapping[int, int]
) -> tuple[HostSpec, ...]:
    """These hosts with what a placement of these versions gives them."""
    held = held_by_host(experts, versions)
    return tuple(
        replace(
            spec,
            experts=held.get(spec.host_id, {}),
            variants=variants_of(versions, held.get(spec.host_id, {}), sizes),
        )
        for spec in hosts
    )


def joined(deployment: Deployment, spec: HostSpec) -> Deployment:
    """With one more host, which holds nothing yet, one epoch on."""
    table = PlacementTable.from_json(deployment.table)
    table = replace(table, epoch=table.epoch + 1, hosts={**table.hosts, spec.host_id: None})
    limits = deployment.limits
    selectors = {**limits.selectors, spec.host_id: deployment.group(spec.group).selector}
    return replace(
        deployment,
        hosts=(*deployment.hosts, spec),
        table=table.to_json(),
        limits=replace(limits, selectors=selectors),
    )


def left(deployment: Deployment, host_id: str) -> Deployment:
    """Without a host that holds nothing, one epoch on."""
    table = PlacementTable.from_json(deployment.table)
    assert host_id not in by_host(table.experts)
    hosts = {name: address for name, address in table.hosts.items() if name != host_id}
    costs = {name: cost for name, cost in table.costs.items() if name != host_id}
    return replace(
        deployment,
        hosts=tuple(spec for spec in deployment.hosts if spec.host_id != host_id),
        table=replace(table, epoch=table.epoch + 1, hosts=hosts, costs=costs).to_json(),
        leaving=tuple(name for name in deployment.leaving if name != host_id),
    )


def to_leave(deployment: Deployment, host_ids: Collection[str]) -> Deployment:
    """With these hosts on their way out."""
    return replace(deployment, leaving=tuple(dict.fromkeys((*deployment.leaving, *host_ids))))


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
