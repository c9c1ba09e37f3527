"""What controller and autoscaler are given: hosts, nodes, a store. Ray is behind them, or memory in unit tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cluster.holdings import Holdings
from cluster.live_versions import Variants
from cluster.messages import HostProgress, HostReport, HostSpec, NodeInfo
from cluster.node_shape import NodeShape
from cluster.repair_state import HostDead, HostFailed, HostReady


class Host(Protocol):
    """One launch of a host, as `actors.ray_hosts.RayHost`; a call that takes too long raises TimeoutError."""

    def progress(self, timeout_s: float) -> HostProgress: ...
    def report(self, timeout_s: float) -> HostReport: ...

    def probe(self, timeout_s: float) -> HostReady | HostFailed | HostDead | None:
        """How it is; None while it loads, or if it doesn't answer: a process that is frozen is not dead."""

    def adopt(self, experts: Holdings, number: int, bandwidth: int, variants: Variants) -> None:
        """Ask it to hold these experts, loading at most so many bytes a second; does not wait.

        `number` is repeated in what it says of itself if it can't; see `cluster.messages.HostHolds`. `variants` says
        what those are that are not the base checkpoint's.
        """

    def stop(self) -> None: ...


class Hosts(Protocol):
    """Starts and finds hosts, as `actors.ray_hosts.RayHosts`."""

    def launch(self, spec: HostSpec, generation: int) -> Host: ...

    def find(self, host_id: str, generation: int | None = None) -> Host | None:
        """The launch of that number if it lives, without a number the newest that lives."""


class Nodes(Protocol):
    """The nodes of the cluster."""

    def living(self) -> tuple[NodeInfo, ...]: ...


class Store(Protocol):
    """One small document that outlives the controller."""

    def load(self) -> bytes | None: ...
    def save(self, document: bytes) -> None: ...


class GroupScaler(Protocol):
    """Changes the number of a group's hosts, as the controller does."""

    def scale(self, group: str, count: int) -> None:
        """The group is to have so many hosts; ExpertmeshError if that can't be, for lack of nodes or memory."""


class NodeProvider(Protocol):
    """Brings nodes and takes them away, as `actors.ray_node_provider.RayNodeProvider`."""

    def request(self, wanted: Mapping[str, NodeShape]) -> None:
        """The cluster is to have room for this, by group, in place of what was asked for before.

        Returns at once: nodes come in minutes, or never. The same may be asked for again and again.
        """

    def describe(self) -> str:
        """What is asked for and what becomes of it, in one line, for `status`."""
