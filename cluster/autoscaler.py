"""The autoscaler: looks at the groups now and then, asks for nodes, and has groups scaled.

What is to be done is decided in `cluster.autoscale`; here it is done. It has no thread: whoever owns it calls `look`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from cluster.autoscale import AutoscaleState, GroupLoad, step
from cluster.config import HostGroup
from cluster.errors import ExpertmeshError
from cluster.group_loads import Snapshot, group_loads
from cluster.node_shape import node_shape
from cluster.ports import GroupScaler, NodeProvider
from cluster.rounds import in_short

log = structlog.get_logger()

# As Kubernetes' autoscaler: long enough for the hosts' mean over it to be one.
PERIOD_S = 15.0


@dataclass(frozen=True, slots=True)
class AutoscaleStatus:
    """A group as `status` shows it."""

    group: str
    hosts_ready: int
    hosts_wanted: int
    target: int
    least: int
    most: int
    reason: str
    """Why the target is what it is, and why it can't be reached."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    target: int
    why: str
    at: float


class Autoscaler:
    """Scales the groups that have `autoscale`. Calls may come from several threads."""

    def __init__(
        self,
        groups: Sequence[HostGroup],
        snapshot: Callable[[], Snapshot],
        scaler: GroupScaler,
        provider: NodeProvider | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        period_s: float = PERIOD_S,
    ) -> None:
        """`snapshot` may take its time and may raise; without a `provider` nodes come and go by hand."""
        self._groups = {group.name: group for group in groups}
        self._snapshot = snapshot
        self._scaler = scaler
        self._provider = provider
        self._clock = clock
        self._period_s = period_s
        self._looking = threading.Lock()
        self._looked_at: float | None = None
        self._before: Snapshot | None = None
        self._memory: dict[str, AutoscaleState] = {}
        self._refused: dict[str, _Refusal] = {}
        self._statuses: tuple[AutoscaleStatus, ...] = ()

    def look(self) -> None:
        """Look at every group, and change what is to be changed. Does nothing before its time or while it looks.

        May take as long as the snapshot, the provider and the scaler take; raises nothing that these raise.
        """
        if not self._looking.acquire(blocking=False):
            return
        try:
            now = self._clock()
            if self._looked_at is None or now - self._looked_at >= self._period_s:
                self._looked_at = now
                self._look(now)
        finally:
            self._looking.release()

    def close(self) -> None:
        """Ask for no nodes any more: when the deployment ends, or they would be kept for nobody."""
        with self._looking:
            self._looked_at = math.inf
            if self._provider is not None:
                try:
                    self._provider.request({})
                except Exception as error:
                    log.warning("nodes may be kept", reason=_in_short(error))

    def statuses(self) -> tuple[AutoscaleStatus, ...]:
        """Every group that is scaled, as it was at the last look."""
        return self._statuses

    def _look(self, now: float) -> None:
        try:
            snapshot = self._snapshot()
        except Exception as error:
            why = f"the load is not known: {_in_short(error)}"
            log.warning("load not seen", reason=why)
            self._statuses = tuple(replace(status, reason=why) for status in self._statuses)
            return
        loads = group_loads(self._before, snapshot)
        self._before = snapshot
        decided = {}
        for name, load in loads.items():
            settings = self._groups[name].autoscale if name in self._groups else None
            if settings is not None:
                decision = step(settings, self._memory.get(name), load, now)
                self._memory[name] = decision.state
                decided[name] = decision
        nodes = self._ask_for_nodes(loads)
        for name, decision in decided.items():
            if decision.target != loads[name].hosts_wanted:
                self._scale(name, loads[name].hosts_wanted, decision.target, decision.reason, now)
        self._statuses = tuple(
            self._status(name, loads[name], decision.target, decision.reason, nodes, now)
            for name, decision in decided.items()
        )

    def _ask_for_nodes(self, loads: dict[str, GroupLoad]) -> str:
        """Ask for nodes while some group waits for them; says what comes.

        Then for room for all groups, scaled or not: a provider thinks of nodes as empty. Otherwise for nothing: nodes
        with hosts on them are in use, and empty ones are to go.
        """
        if self._provider is None:
            return "nobody brings nodes: start them by hand"
        asked = {name: state.asked for name, state in self._memory.items()}
        waits = any(
            max(load.hosts_wanted, asked.get(name, 0)) > load.hosts_ready for name, load in loads.items()
        )
        wanted = {
            name: node_shape(self._groups[name], max(load.hosts_wanted, load.hosts_ready, asked.get(name, 0)))
            for name, load in loads.items()
            if waits and name in self._groups
        }
        try:
            self._provider.request(wanted)
            return self._provider.describe()
        except Exception as error:
            log.warning("nodes not asked for", reason=_in_short(error))
            return f"nodes were not asked for: {_in_short(error)}"

    def _scale(self, name: str, wanted: int, target: int, reason: str, now: float) -> None:
        self._refused.pop(name, None)
        if (why := self._scaled(name, target, reason)) is None:
            return
        self._refused[name] = _Refusal(target, why, now)
        # Nodes may come one by one: each that there is gets its host.
        if target > wanted + 1:
            self._scaled(name, wanted + 1, reason)

    def _scaled(self, name: str, target: int, reason: str) -> str | None:
        """Why it could not be; None if it could."""
        try:
            self._scaler.scale(name, target)
        except Exception as error:
            why = _in_short(error)
            log.warning("group not scaled", group=name, hosts=target, reason=why)
            return why
        log.info("group scaled", group=name, hosts=target, reason=reason)
        return None

    def _status(
        self, name: str, load: GroupLoad, target: int, reason: str, nodes: str, now: float
    ) -> AutoscaleStatus:
        settings = self._groups[name].autoscale
        assert settings is not None
        state, refused = self._memory[name], self._refused.get(name)
        if refused is not None and refused.at < now:
            # Nobody wants it any more, or it came about.
            over = not state.asked if refused.target > load.hosts_wanted else state.lower_since is None
            if over or refused.target == load.hosts_wanted:
                del self._refused[name]
                refused = None
        if refused is not None:
            reason += f"; {refused.target} were refused {now - refused.at:.0f} s ago: {refused.why}"
        if nodes and (load.hosts_ready < load.hosts_wanted or state.asked > load.hosts_wanted):
            reason += f"; {nodes}"
        return AutoscaleStatus(
            name, load.hosts_ready, load.hosts_wanted, target, settings.min, settings.max, reason
        )


def _in_short(error: Exception) -> str:
    return error.message if isinstance(error, ExpertmeshError) else in_short(error)
