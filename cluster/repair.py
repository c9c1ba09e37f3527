"""What becomes of hosts that are lost: a state machine without clock, threads or Ray.

`step` takes what was seen and the time, and returns the next state and what to do. Its rules:

1. A host's launches are numbered; what is seen of an older one than the current is ignored.
2. A host is in the table only while the current launch has said that it is ready.
3. A host that dies is launched again: at once, then after growing pauses, until it stays up.
4. A host whose node is gone goes to another one with room, or waits for room.
5. A change of who is ready is a new epoch.

Nothing is repaired before every host was ready once: until then it is for the caller to give up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from cluster.messages import NodeInfo
from cluster.rehome import Resident, memory, moved, new_home
from cluster.repair_state import (
    RUNNING,
    Action,
    Backoff,
    End,
    HostDead,
    HostFailed,
    HostReady,
    HostState,
    Launch,
    NodesSeen,
    Observation,
    Phase,
    Publish,
    Repair,
    Tick,
    Wanted,
)

_UNITS: Final = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def step(wanted: Wanted, state: Repair, seen: Observation, now: float) -> tuple[Repair, tuple[Action, ...]]:
    """The state after `seen`, and what is to be done, in this order."""
    after = _observed(wanted, state, seen, now)
    if after is state and not isinstance(seen, Tick):
        return state, ()
    if not after.repairing:
        if not all(host.phase is Phase.READY for host in after.hosts.values()):
            return after, ()
        after = replace(after, repairing=True)
    actions: list[Action] = []
    after, launches = _launch_due(wanted, after, now)
    if after.table != state.table:
        after = replace(after, epoch=after.epoch + 1)
        # First: who is lost should be asked no longer than it takes.
        actions.append(Publish(after.epoch, after.table))
    # With every tick again, since the first may have been lost with the controller.
    actions += [
        End(host_id, host.generation)
        for host_id, host in after.hosts.items()
        if host.phase is Phase.ENDING
        and (isinstance(seen, Tick) or state.hosts[host_id].phase is not Phase.ENDING)
    ]
    return after, (*actions, *launches)


def launch(wanted: Wanted, state: Repair, host_id: str, now: float) -> tuple[Repair, Launch]:
    """The state once the host is launched as planned, and the launch: for hosts that were never ready yet."""
    return _launched(wanted, state, host_id, None, now)


def _observed(wanted: Wanted, state: Repair, seen: Observation, now: float) -> Repair:
    """The state with what was seen; the very same object if that is nothing new."""
    if isinstance(seen, NodesSeen):
        return _nodes_seen(state, seen)
    if isinstance(seen, Tick):
        return _time_went_on(wanted, state, now)
    host = state.hosts.get(seen.host_id)
    # After a launch died, what it said before may still arrive: then its phase is none of these.
    if host is None or seen.generation != host.generation or host.phase not in RUNNING:
        return state
    if isinstance(seen, HostDead):
        reason = host.reason if host.phase is Phase.ENDING else seen.reason
        after = _died(host, reason, now, wanted.backoff)
    elif host.phase is Phase.READY and isinstance(seen, HostReady):
        if seen.weight_bytes == host.weight_bytes:
            return state
        after = replace(host, weight_bytes=seen.weight_bytes)
    elif host.phase is not Phase.STARTING:
        return state
    elif isinstance(seen, HostFailed):
        after = replace(host, phase=Phase.ENDING, reason=seen.reason)
    else:
        after = replace(
            host, phase=Phase.READY, address=seen.address, ready_at=now, weight_bytes=seen.weight_bytes
        )
    return _with_host(state, seen.host_id, after)


def _nodes_seen(state: Repair, seen: NodesSeen) -> Repair:
    # A cluster without a node could not have answered.
    if not seen.living or (state.nodes is not None and seen.at <= state.nodes.at):
        return state
    living = {node.node_id for node in seen.living}
    hosts = {
        host_id: replace(host, phase=Phase.DOWN, address=None, reason=f"node {host.node_id} is gone")
        # What was seen before the launch says nothing about the node that it was launched on.
        if host.phase in RUNNING and host.node_id not in living and host.launched_at < seen.at
        else host
        for host_id, host in state.hosts.items()
    }
    return replace(state, hosts=hosts, nodes=seen)


def _time_went_on(wanted: Wanted, state: Repair, now: float) -> Repair:
    for host_id, host in state.hosts.items():
        if (
            host.phase is Phase.READY
            and (host.crashes or host.reason)
            and now - host.ready_at >= wanted.backoff.quiet_s
        ):
            state = _with_host(state, host_id, replace(host, crashes=0, reason=""))
    return state


def _died(host: HostState, reason: str, now: float, backoff: Backoff) -> HostState:
    quiet = host.phase is Phase.READY and now - host.ready_at >= backoff.quiet_s
    crashes = 1 if quiet else host.crashes + 1
    pause = backoff.pause(crashes)
    return replace(
        host,
        phase=Phase.BACKING_OFF if pause else Phase.DOWN,
        address=None,
        crashes=crashes,
        retry_at=now + pause,
        reason=reason,
    )


def _launch_due(wanted: Wanted, state: Repair, now: float) -> tuple[Repair, list[Launch]]:
    """Launch what may be launched: where it lies if that node lives, else where there is room."""
    if state.nodes is None:
        return state, []
    living = state.nodes.living
    nodes = {node.node_id: node for node in living}
    due = [
        host_id
        for host_id, host in state.hosts.items()
        if host.phase in (Phase.DOWN, Phase.NO_ROOM)
        or (host.phase is Phase.BACKING_OFF and host.retry_at <= now)
    ]
    # The large ones first among those that move, or the small ones would break up the room.
    due.sort(key=lambda h: (state.hosts[h].node_id not in nodes, -state.hosts[h].weight_bytes, h))
    launches = []
    for host_id in due:
        host = state.hosts[host_id]
        node = nodes.get(host.node_id)
        if node is None:
            lying = {h: Resident(wanted.specs[h], s.node_id, s.weight_bytes) for h, s in state.hosts.items()}
            moving = lying.pop(host_id)
            node = new_home(moving, list(lying.values()), living, wanted.limits)
            if node is None:
                waiting = replace(host, phase=Phase.NO_ROOM, reason=_no_room(moving))
                state = _with_host(state, host_id, waiting) if waiting != host else state
                continue
        state, launched = _launched(wanted, state, host_id, node, now)
        launches.append(launched)
    return state, launches


def _launched(
    wanted: Wanted, state: Repair, host_id: str, node: NodeInfo | None, now: float
) -> tuple[Repair, Launch]:
    host, spec = state.hosts[host_id], wanted.specs[host_id]
    spec = spec if node is None else moved(spec, node)
    after = replace(
        host,
        node_id=spec.node_id,
        phase=Phase.STARTING,
        generation=host.generation + 1,
        address=None,
        launched_at=now,
    )
    return _with_host(state, host_id, after), Launch(spec, after.generation)


def _no_room(moving: Resident) -> str:
    share = moving.spec.gpus
    wants = f"the {_size(memory(moving))} that it needs"
    if share:
        wants = "a GPU for it" if share == 1 else f"its share of {share:f} left on one GPU"
    return f"node {moving.node_id} is gone and no living node that fits has {wants}"


def _size(count: int) -> str:
    unit, bytes_ = next((u for u in _UNITS if count >= u[1]), _UNITS[-1])
    return f"{count / bytes_:.1f} {unit}"


def _with_host(state: Repair, host_id: str, host: HostState) -> Repair:
    return replace(state, hosts={**state.hosts, host_id: host})
