"""From the placement that serves to the next one, without a pause: a pure function of what hosts hold.

    1. hosts load what the next placement adds for them, beside what they hold
    2. once all of it is there, the table is flipped to the next placement
    3. once every engine says that it uses the new table, hosts drop what no table names any more
    4. hosts that are to leave and that no table names any more are ended

Nothing of this is remembered but the two placements: each round compares what should be held with what is, so that
a controller that was restarted goes on wherever its predecessor ended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from cluster.holdings import Holders, Holdings, by_host, digest, union
from cluster.live_versions import LiveVersions, numbers
from cluster.messages import HostHolds


@dataclass(frozen=True, slots=True)
class Following:
    """The placement that is to come."""

    number: int
    """Of the change, counted up, so that what a host says of an earlier one is not taken for this one's."""
    experts: Mapping[int, tuple[tuple[str, ...], ...]]
    """Layer index → per expert the hosts that are to hold it."""
    reason: str
    versions: LiveVersions | None = None
    """What they are to hold of each expert, if that changes."""


@dataclass(frozen=True, slots=True)
class Adopt:
    """Tell a host to hold these experts from now on, by their numbers (see `cluster.live_versions`)."""

    host_id: str
    experts: Holdings
    number: int
    """Of the change; 0 to drop what is not needed any more."""


@dataclass(frozen=True, slots=True)
class Flip:
    """The next placement is loaded everywhere: make it the current one."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """The next placement can't be had."""

    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing asks for a host any more that was to leave."""

    host_id: str


Todo = Adopt | Flip | Abandon | Leave

NO_VERSIONS: Final = LiveVersions()


def held_by_host(experts: Holders, versions: LiveVersions) -> dict[str, Holdings]:
    """What a placement gives each host that it names: of each expert all that the versions ask for."""
    return {host_id: numbers(versions, held) for host_id, held in by_host(experts).items()}


def todo(
    current: Holders,
    following: Following | None,
    hosts: Mapping[str, HostHolds | None],
    leaving: Collection[str],
    *,
    in_use: bool,
    versions: LiveVersions = NO_VERSIONS,
) -> list[Todo]:
    """What is to be done now.

    `current` is the placement that serves and `following` the next one, if there is one; `hosts` are all hosts, None
    for one that is not ready; `in_use` says whether every engine uses the current table, so that what it does not
    name is not asked for any more. `versions` are those that serve.
    """
    actions: list[Todo] = []
    held = held_by_host(current, versions)
    wanted: dict[str, Holdings] = {host_id: held.get(host_id, {}) for host_id in hosts}
    if following is not None:
        waiting, coming = False, held_by_host(following.experts, following.versions or versions)
        for host_id, known in hosts.items():
            now = wanted[host_id]
            both = union(now, coming.get(host_id, {}))
            if both == now:
                continue
            if known is None:
                return [Abandon(f"host {host_id} is not ready, or does not answer")]
            if known.failed == following.number:
                return [Abandon(f"host {host_id} could not load its experts: {known.error}")]
            wanted[host_id] = both
            waiting |= known.holds != digest(both)
        if not waiting:
            return [Flip()]
    for host_id, known in hosts.items():
        target = digest(wanted[host_id])
        if known is None or target in (known.holds, known.adopting):
            continue
        if following is None and not in_use:
            # An engine may still ask for what the table before named.
            continue
        actions.append(Adopt(host_id, wanted[host_id], following.number if following is not None else 0))
    if following is None and in_use:
        actions += [Leave(host_id) for host_id in hosts if host_id in leaving and not wanted[host_id]]
    return actions
