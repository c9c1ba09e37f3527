"""What the admin API says of host groups and nodes: `GET /groups`, and what comes back of a drain or of scaling.

Whoever brings nodes, such as `expertmesh operator`, decides by this. The same dataclasses on both sides of the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True)
class GroupState:
    """One host group."""

    name: str
    hosts: int
    """Those that stay."""
    ready: int
    """Of those that stay."""
    wanted: int | None
    """Hosts that there should be room for; None where every node that matches has one."""
    waiting_for: str = ""
    """Why it has fewer than are wanted."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """One living node of the Ray cluster."""

    node_id: str
    ip: str
    hostname: str
    hosts: tuple[str, ...] = ()
    """Ids of all hosts that are there, those that leave among them."""
    leaving: tuple[str, ...] = ()
    drained: bool = False
    """Nothing is placed there any more; whether it is empty is what `hosts` says."""
    reason: str | None = None
    """Why it is drained, as whoever asked for it said; None if nobody did by this API."""
    stuck: str = ""
    """Why its hosts can't be emptied yet."""


@dataclass(frozen=True, slots=True)
class GroupsReport:
    """A mesh as whoever brings nodes sees it."""

    served_name: str
    run: str
    epoch: int
    groups: tuple[GroupState, ...]
    nodes: tuple[NodeState, ...]
    change: str = ""
    """Why experts are being moved; "" if they are not."""


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain began."""

    node_id: str
    leaving: tuple[str, ...]
    """Hosts that are emptied and then ended."""
    staying: tuple[str, ...]
    """Hosts that nobody can stand in for yet; it is tried again until somebody can."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Scaled:
    """What became of a group's new number of hosts."""

    wanted: int
    coming: tuple[str, ...]
    leaving: tuple[str, ...]
    lacking: int
    """Hosts for which there is no node yet; they are started as nodes join."""
    why: str = ""


GROUPS: Final = TypeAdapter(GroupsReport)
"""Reads and writes it as JSON."""
DRAINED: Final = TypeAdapter(Drained)
