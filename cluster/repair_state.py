"""What `cluster.repair` knows, sees and asks for: hosts in their phases, observations, actions.

Times are seconds of any clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cluster.messages import HostAddress, HostCost, HostHolds, HostSpec, NodeInfo, Sources
from cluster.rehome import Limits


class Phase(StrEnum):
    """Where a host is in its life."""

    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    ENDING = "failed to load"
    """It lives and can't load: it is ended, and launched again when it is dead."""
    DOWN = "down"
    BACKING_OFF = "backing off"
    NO_ROOM = "waiting for room"


RUNNING = frozenset({Phase.STARTING, Phase.READY, Phase.ENDING})
"""Phases in which a process of the host may live."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses before a host that crashed again is launched again, in seconds."""

    first_s: float = 1.0
    longest_s: float = 60.0
    quiet_s: float = 60.0
    """A host that was ready for so long starts with a clean record."""

    def pause(self, crashes: int) -> float:
        """Before the launch after so many crashes in a row: none after the first, then twice as long each."""
        return min(self.longest_s, self.first_s * 2.0 ** min(crashes - 2, 30)) if crashes > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run, and how it is repaired; stays as it is for a deployment's life."""

    specs: Mapping[str, HostSpec]
    limits: Limits = field(default_factory=Limits)
    backoff: Backoff = field(default_factory=Backoff)


FIRST_LAUNCH = 1
"""The number of a host's first launch."""


@dataclass(frozen=True, slots=True)
class HostState:
    """What is known of one host."""

    node_id: str
    phase: Phase = Phase.PLANNED
    generation: int = 0
    """Number of the current launch; 0 before the first."""
    address: HostAddress | None = None
    """Only while it is ready."""
    launched_at: float = 0.0
    ready_at: float = 0.0
    retry_at: float = 0.0
    crashes: int = 0
    """Since it last was ready for a while; the loss of its node is not counted."""
    reason: str = ""
    """Why it is not ready, or why it was last launched again."""
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """The living nodes, as they were at the time `at`."""

    at: float
    living: tuple[NodeInfo, ...]


@dataclass(frozen=True, slots=True)
class HostReady:
    host_id: str
    generation: int
    address: HostAddress
    weight_bytes: int
    holds: HostHolds | None = None
    """Its experts; None from a host that was made for one placement."""
    cost: HostCost | None = None
    """Measured, if it was."""


@dataclass(frozen=True, slots=True)
class HostFailed:
    """It lives, but could not load."""

    host_id: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class HostDead:
    """Its process is gone for good. Not: it doesn't answer."""

    host_id: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing was seen, time went on."""


Observation = NodesSeen | HostReady | HostFailed | HostDead | Tick


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a host on ``spec.node_id``."""

    spec: HostSpec
    generation: int


@dataclass(frozen=True, slots=True)
class End:
    """End what lives of a launch; asked for until it is dead."""

    host_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Make the table with these addresses the current one."""

    epoch: int
    hosts: Mapping[str, HostAddress | None]


Action = Launch | End | Publish


@dataclass(frozen=True, slots=True)
class Repair:
    """State of all hosts. To be saved before the actions of a step are done, or a successor would do other ones."""

    hosts: Mapping[str, HostState]
    epoch: int = 0
    """Of the last table."""
    repairing: bool = False
    """Whether every host was ready once."""
    nodes: NodesSeen | None = None
    """None after a restart, until they are looked at: nothing is launched onto nodes of yesterday."""

    @property
    def table(self) -> dict[str, HostAddress | None]:
        """Addresses as in the last table."""
        return {host_id: host.address if self.repairing else None for host_id, host in self.hosts.items()}


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host as `status` shows it."""

    host_id: str
    node_id: str
    state: str
    launches: int
    crashes: int
    reason: str
    next_try_s: float | None
    """Seconds until it is launched again; None if that does not depend on time."""


def planned(specs: Mapping[str, HostSpec], epoch: int) -> Repair:
    """The state before anything is launched."""
    return Repair({host_id: HostState(spec.node_id) for host_id, spec in specs.items()}, epoch)


def rebased(state: Repair, seconds: float) -> Repair:
    """A saved state by another clock, which shows `seconds` more than the one that it was saved by."""
    hosts = {
        host_id: replace(
            host,
            launched_at=host.launched_at + seconds,
            ready_at=host.ready_at + seconds,
            retry_at=host.retry_at + seconds,
        )
        for host_id, host in state.hosts.items()
    }
    return replace(state, hosts=hosts, nodes=None)


def sources(state: Repair, host_id: str, lacking: Collection[str]) -> Sources:
    """Where `host_id` may copy experts from, if the hosts `lacking` look for a source themselves."""
    others = {other: host for other, host in state.hosts.items() if other != host_id}
    return Sources(
        ready=tuple(host.address for host in others.values() if host.address is not None),
        loading=tuple(
            other
            for other, host in others.items()
            if host.phase in (Phase.PLANNED, Phase.STARTING) and other not in lacking
        ),
    )


def statuses(state: Repair, now: float) -> list[HostStatus]:
    """Every host as `status` shows it."""
    return [
        HostStatus(
            host_id=host_id,
            node_id=host.node_id,
            state=host.phase.value,
            launches=host.generation,
            crashes=host.crashes,
            reason=host.reason,
            next_try_s=max(0.0, host.retry_at - now) if host.phase is Phase.BACKING_OFF else None,
        )
        for host_id, host in state.hosts.items()
    ]
