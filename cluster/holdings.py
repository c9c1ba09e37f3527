"""Which experts one host holds, and a short name for it that two processes can compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256

Holdings = Mapping[int, tuple[int, ...]]
"""Layer index → experts, ascending; no layer without one."""

Holders = Mapping[int, Sequence[Sequence[str]]]
"""Layer index → per expert the ids of the hosts that hold it."""


def by_host(holders: Holders) -> dict[str, dict[int, tuple[int, ...]]]:
    """What a placement gives each host that it names."""
    held: dict[str, dict[int, list[int]]] = {}
    for layer, rows in holders.items():
        for expert, hosts in enumerate(rows):
            for host_id in hosts:
                held.setdefault(host_id, {}).setdefault(layer, []).append(expert)
    return {
        host_id: {layer: tuple(experts) for layer, experts in layers.items()}
        for host_id, layers in held.items()
    }


def union(first: Holdings, second: Holdings) -> dict[int, tuple[int, ...]]:
    """What either of them names."""
    return {
        layer: tuple(sorted({*first.get(layer, ()), *second.get(layer, ())}))
        for layer in sorted({*first, *second})
    }


def digest(holdings: Holdings) -> str:
    """Names the experts in 16 hexadecimal digits, in whatever order they are given."""
    plain = [[layer, sorted(experts)] for layer, experts in sorted(holdings.items()) if experts]
    return sha256(json.dumps(plain).encode()).hexdigest()[:16]
