"""What host groups have to do, from two looks at their hosts and at the engines' queues: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.autoscale import GroupLoad
from cluster.messages import HostReport


@dataclass(frozen=True, slots=True)
class Queue:
    """Requests in the engines."""

    waiting: float
    running: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is to be seen at one time."""

    at: float
    """Seconds, of any clock that only goes forward."""
    wanted: Mapping[str, int]
    """Group → hosts that it should have, as it was last scaled."""
    groups: Mapping[str, str]
    """Host → its group, those that are being drained too."""
    reports: Mapping[str, HostReport | str]
    """Host → its report, or why there is none."""
    allowed_bytes: Mapping[str, int] = field(default_factory=dict)
    """Host → bytes of weights that the planner may give it."""
    queue: Queue | None = None
    """Of all engines together; None if they did not say."""


def group_loads(before: Snapshot | None, after: Snapshot) -> dict[str, GroupLoad]:
    """The load of every group at `after`; utilisation is that of the time between the two.

    A host that was not ready at both times does not count for utilisation, one without a report for nothing.
    """
    ready: dict[str, dict[str, HostReport]] = {group: {} for group in after.wanted}
    for host_id, group in after.groups.items():
        report = after.reports.get(host_id)
        if isinstance(report, HostReport) and group in ready:
            ready[group][host_id] = report
    return {
        group: GroupLoad(
            utilisation=_utilisation(before, after, reports),
            waiting=after.queue.waiting if after.queue else None,
            running=after.queue.running if after.queue else None,
            memory_share=_memory_share(reports, after.allowed_bytes),
            hosts_ready=len(reports),
            hosts_wanted=after.wanted[group],
        )
        for group, reports in ready.items()
    }


def _utilisation(before: Snapshot | None, after: Snapshot, reports: Mapping[str, HostReport]) -> float | None:
    if before is None or after.at <= before.at:
        return None
    shares: Sequence[float] = [
        min(1.0, _computed(before.reports[host_id], report) / (after.at - before.at))
        for host_id, report in reports.items()
        if isinstance(before.reports.get(host_id), HostReport)
    ]
    return sum(shares) / len(shares) if shares else None


def _computed(before: HostReport | str, after: HostReport) -> float:
    """Seconds of computing between two reports; a process that was started meanwhile has counted from zero."""
    assert isinstance(before, HostReport)
    same = (before.address.node_id, before.address.pid) == (after.address.node_id, after.address.pid)
    return after.compute_seconds - (before.compute_seconds if same else 0.0)


def _memory_share(reports: Mapping[str, HostReport], allowed: Mapping[str, int]) -> float | None:
    known = {host_id: report for host_id, report in reports.items() if allowed.get(host_id)}
    total = sum(allowed[host_id] for host_id in known)
    return sum(report.weight_bytes for report in known.values()) / total if total else None
