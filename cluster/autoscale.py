"""How many hosts a group should have: a state machine without clock, threads or Ray.

`step` takes a group's load and the time, and returns the number. Its rules:

1. Each metric wishes for count · value / target hosts, rounded up, or for as many as there are within a tenth of
   its target; the largest wish wins (Kubernetes' HorizontalPodAutoscaler, "algorithm details"). A metric that is
   not known wishes for as many as there are.
2. Up at once, all the way, if the last change is up_cooldown ago.
3. Down by one, if fewer were wished for all through down_cooldown since the last change: each host is to be drained.
4. While hosts are missing the load says nothing: it stays, but for the bounds.
5. The bounds hold whatever is wished. A group that somebody else scaled beyond them is led back.

Times are seconds of any clock that only goes forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from cluster.config_autoscale import AutoscaleConfig

# Kubernetes' default: within it a group would follow every breath of the traffic.
_TOLERANCE: Final = 0.1
# A queue in front of hosts that are less busy than this part of their target waits for something else, such as KV
# cache: more hosts would not shorten it, and would be added without end.
_BUSY_ENOUGH: Final = 0.5
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What was seen of one group."""

    utilisation: float | None
    """Share of the time that its hosts compute, 0 to 1, their mean; None if it is not known, like all below."""
    waiting: float | None
    """Requests that wait in the engines."""
    running: float | None
    memory_share: float | None
    """Bytes of weights that its hosts hold, over those that they may."""
    hosts_ready: int
    """More than are wanted while some are drained."""
    hosts_wanted: int
    """As the group was last scaled."""


@dataclass(frozen=True, slots=True)
class AutoscaleState:
    """What is remembered of one group from look to look."""

    count: int
    """Hosts wanted: as last seen, or as last decided."""
    changed_at: float
    lower_since: float | None = None
    """Since when fewer hosts are wished for without a break."""
    asked: int = 0
    """Hosts decided on that the group does not have, for lack of nodes: these are asked for until they come."""


class Decision(NamedTuple):
    """A group's next state, the hosts that it should have now, and why, in words."""

    state: AutoscaleState
    target: int
    reason: str


class _Wish(NamedTuple):
    hosts: int
    why: str


def step(settings: AutoscaleConfig, state: AutoscaleState | None, seen: GroupLoad, now: float) -> Decision:
    """What to do about the group; `state` is None at the first look."""
    count, least, most = seen.hosts_wanted, settings.min, settings.max
    state = _observed(state, count, now)
    if count < least:
        return _changed(state, least, now, f"at least {least} are to run")
    if seen.hosts_ready < count:
        return _stays(state, f"{count - seen.hosts_ready} of {_hosts(count)} not ready")
    draining = seen.hosts_ready > count
    if count > most:
        if draining:
            return _stays(state, f"at most {most} may run, a host is being drained")
        return _changed(state, count - 1, now, f"at most {most} may run")
    wish, why = max(_wishes(settings, seen), key=lambda wish: wish.hosts)
    target = min(max(wish, least), most)
    if wish != count:
        why += f", which asks for {_hosts(wish)}"
    if target != wish:
        why += f", at most {most} may run" if target < wish else f", at least {least} are to run"
    since_change = now - state.changed_at
    if target > count:
        if since_change < settings.up_cooldown:
            return _stays(state, f"{why}, in {settings.up_cooldown - since_change:.0f} s")
        return _changed(state, target, now, why)
    if since_change >= settings.up_cooldown:
        state = replace(state, asked=0)
    if target == count:
        return _stays(state, why)
    since = now if state.lower_since is None else state.lower_since
    state = replace(state, lower_since=since)
    if draining:
        return Decision(state, count, f"{why}, a host is being drained")
    if now - since < settings.down_cooldown:
        return Decision(
            state, count, f"{why}, in {settings.down_cooldown - (now - since):.0f} s if that lasts"
        )
    return _changed(state, count - 1, now, why)


def _wishes(settings: AutoscaleConfig, seen: GroupLoad) -> Iterator[_Wish]:
    """What each metric that is looked at wishes for."""
    count, busy = seen.hosts_wanted, seen.utilisation
    yield _proportional("utilisation", busy, float(settings.utilisation), count)
    if settings.memory is not None:
        yield _proportional("memory", seen.memory_share, float(settings.memory), count)
    if settings.queue is not None:
        yield _queue(float(settings.queue), float(settings.utilisation), seen)


def _proportional(name: str, value: float | None, target: float, count: int) -> _Wish:
    if value is None:
        return _Wish(count, f"{name} is not known yet")
    why = f"{name} is {value:.0%}, to be {target:.0%}"
    return _Wish(_scaled(count, value / target), why)


def _queue(target: float, busy_target: float, seen: GroupLoad) -> _Wish:
    """More hosts if too many requests wait; fewer hosts are for the other metrics to wish."""
    count = seen.hosts_wanted
    if seen.waiting is None or seen.running is None or seen.utilisation is None:
        return _Wish(count, "the queue is not known yet")
    running = max(seen.running, 1)
    waiting = seen.waiting / running
    why = f"{seen.waiting:g} requests wait and {seen.running:g} run, {target:g} may wait for each"
    if waiting < target * (1 - _TOLERANCE) or seen.utilisation < busy_target * _BUSY_ENOUGH:
        return _Wish(0, why)
    if waiting <= target * (1 + _TOLERANCE):
        return _Wish(count, why)
    # All requests, over those that may be there.
    return _Wish(_ceil(count * (1 + waiting) / (1 + target)), why)


def _scaled(count: int, ratio: float) -> int:
    return count if abs(ratio - 1) <= _TOLERANCE + _ROUNDING else _ceil(count * ratio)


def _ceil(number: float) -> int:
    # 6 · (0.7 / 0.6) is a little more than 7.
    return math.ceil(number - _ROUNDING)


def _observed(state: AutoscaleState | None, count: int, now: float) -> AutoscaleState:
    """The state with the number of hosts that are wanted now."""
    if state is None:
        return AutoscaleState(count, now)
    if state.count == count:
        return replace(state, asked=0) if 0 < state.asked <= count else state
    # Either what was decided could not be, or somebody else scaled the group.
    refused = count < state.count == state.asked
    return AutoscaleState(count, now, asked=state.asked if refused else 0)


def _changed(state: AutoscaleState, target: int, now: float, why: str) -> Decision:
    reason = f"{why}: {target} instead of {state.count}"
    return Decision(AutoscaleState(target, now, asked=target if target > state.count else 0), target, reason)


def _stays(state: AutoscaleState, why: str) -> Decision:
    return Decision(replace(state, lower_since=None), state.count, why)


def _hosts(count: int) -> str:
    return f"{count} host{'s' * (count != 1)}"
