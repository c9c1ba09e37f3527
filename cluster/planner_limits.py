"""What hosts can hold: slots per layer, pins, failure domains, and what is missing, per group, in numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cluster.errors import PlacementError
from cluster.fleet import FleetHost, LayerLoad, Pin, PlanSettings


def domains(hosts: Sequence[FleetHost], spread: str) -> np.ndarray:
    """int32 [H]: numbers of the hosts' failure domains; a host without a name for its domain is one of its own."""
    names = [getattr(host, "host_id" if spread == "host" else spread) or host.host_id for host in hosts]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int32)


def allowed_hosts(
    hosts: Sequence[FleetHost], loads: Sequence[LayerLoad], pins: Sequence[Pin]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """bool [P, H]: hosts that each kind of expert may be on, the first kind unpinned; per layer int32 [E] the kind.

    Experts that several pins name are admitted where all of them admit them.
    """
    kinds: dict[tuple[int, ...], int] = {(): 0}
    pin_of = []
    for load in loads:
        mine: list[tuple[int, ...]] = [()] * load.rows.shape[1]
        for number, pin in enumerate(pins):
            for expert in pin.experts.get(load.layer, ()):
                if not 0 <= expert < len(mine):
                    raise PlacementError(
                        f"a pin names expert {expert} of layer {load.layer}, which has {len(mine)}",
                        "name experts that the model has",
                    )
                mine[expert] = (*mine[expert], number)
        pin_of.append(np.array([kinds.setdefault(names, len(kinds)) for names in mine], np.int32))
    allowed = np.array([[all(pins[n].admits(host) for n in names) for host in hosts] for names in kinds])
    return allowed, pin_of


def layer_slots(hosts: Sequence[FleetHost], loads: Sequence[LayerLoad]) -> np.ndarray:
    """int32 [L, H]: blobs of each layer that a host may hold, never more in all than its memory admits.

    A layer gets memory in proportion to its bytes. Remainders go round, so that no layer lacks more than others: what
    is left is divided anew for each layer, by largest remainders.
    """
    slots = np.zeros((len(loads), len(hosts)), np.int32)
    free = np.array([host.memory_bytes for host in hosts], np.float64)
    sizes = np.array([load.blob_bytes * load.rows.shape[1] for load in loads], np.float64)
    for number, load in enumerate(loads):
        quota = np.minimum(free * sizes[number] / sizes[number:].sum() / load.blob_bytes, load.rows.shape[1])
        whole = np.floor(quota + 1e-9)
        missing = round(float(quota.sum())) - int(whole.sum())
        fits = free - whole * load.blob_bytes >= load.blob_bytes
        order = np.argsort(-(quota - whole) * fits, kind="stable")
        chosen = [h for h in order[:missing] if fits[h]] if missing > 0 else []
        whole[chosen] += 1
        slots[number] = np.minimum(whole, load.rows.shape[1])
        free -= slots[number] * float(load.blob_bytes)
    return slots


def check(hosts: Sequence[FleetHost], loads: Sequence[LayerLoad], settings: PlanSettings) -> None:
    """PlacementError if there is no plan: too little memory, too few failure domains, pins that nothing admits."""
    if not hosts:
        raise PlacementError("there are no expert hosts", "add a host group")
    copies = max([settings.min_replicas, *(max(row, default=1) for row in settings.least.values())])
    alive = [host for host in hosts if host.memory_bytes > 0]
    for spread, wanted in (("host", copies), (settings.spread, _apart(copies, settings))):
        distinct = _distinct(alive, spread)
        if distinct < wanted:
            raise PlacementError(
                f"{copies} copies on distinct {spread}s need {wanted} {spread}s, there are {distinct}: "
                + _groups(alive, lambda group, spread=spread: f"{_distinct(group, spread)} {spread}(s)"),  # type: ignore[misc]
                f"add {wanted - distinct}, or ask for fewer replicas",
            )
    need = sum(load.blob_bytes * sum(_least(load, settings)) for load in loads)
    have = sum(_useful(host, loads) for host in alive)
    if have < need:
        raise PlacementError(
            f"the experts take {_size(need)} ({_copies(loads, settings)}), the hosts have room for {_size(have)}: "
            f"{_size(need - have)} short; "
            + _groups(alive, lambda group: _size(sum(_useful(h, loads) for h in group))),
            "raise the memory of a host group, add hosts, or ask for fewer replicas",
        )
    for number, pin in enumerate(settings.pins):
        _check_pin(f"pin {number} ({pin.wish})", pin, alive, loads, settings)


def _check_pin(
    name: str, pin: Pin, hosts: Sequence[FleetHost], loads: Sequence[LayerLoad], settings: PlanSettings
) -> None:
    admitting = [host for host in hosts if pin.admits(host)]
    distinct = _distinct(admitting, settings.spread)
    pinned = [
        (load.blob_bytes, _least(load, settings)[expert])
        for load in loads
        for expert in set(pin.experts.get(load.layer, ()))
    ]
    wanted = _apart(max((copies for _, copies in pinned), default=0), settings)
    if distinct < wanted:
        raise PlacementError(
            f"{name} needs {wanted} {settings.spread}(s) that admit it, there are {distinct}; "
            + _groups(hosts, lambda group: f"{sum(map(pin.admits, group))} of {len(group)} hosts"),
            "add such hosts, or change the pin",
        )
    need = sum(size * copies for size, copies in pinned)
    have = sum(host.memory_bytes for host in admitting)
    if have < need:
        raise PlacementError(
            f"{name} ties {_size(need)} to hosts with {_size(have)}: {_size(need - have)} "
            "short; " + _groups(admitting, lambda group: _size(sum(h.memory_bytes for h in group))),
            "pin fewer experts, or give those hosts more memory",
        )


def _apart(copies: int, settings: PlanSettings) -> int:
    """In how many failure domains so many copies must be."""
    return copies if settings.apart is None else min(copies, settings.apart)


def _least(load: LayerLoad, settings: PlanSettings) -> Sequence[int]:
    """Copies that each expert of a layer must have."""
    return settings.least.get(load.layer, (settings.min_replicas,) * load.rows.shape[1])


def _copies(loads: Sequence[LayerLoad], settings: PlanSettings) -> str:
    numbers = {copies for load in loads for copies in _least(load, settings)}
    few, many = min(numbers, default=1), max(numbers, default=1)
    return f"{many} copies" if few == many else f"{few} to {many} copies"


def _useful(host: FleetHost, loads: Sequence[LayerLoad]) -> int:
    """Bytes that a host can use: an expert twice on a host is of no use."""
    return min(host.memory_bytes, sum(load.blob_bytes * load.rows.shape[1] for load in loads))


def _size(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit / 10:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} bytes"


def _distinct(hosts: Sequence[FleetHost], spread: str) -> int:
    return len(set(domains(hosts, spread).tolist()))


def _groups(hosts: Iterable[FleetHost], say: Callable[[list[FleetHost]], str]) -> str:
    by_group: dict[str, list[FleetHost]] = defaultdict(list)
    for host in hosts:
        by_group[host.group].append(host)
    return ", ".join(f"group {name}: {say(group)}" for name, group in by_group.items()) or "no host"
