"""Which hosts hold the copies of experts that have unequal numbers of them. Pure functions.

Hosts are counted from 0, those of a node side by side; an expert is (layer, number) of ``copies``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from cluster.apportion import apportion
from cluster.deal import apportion_copies, deal

Holders = list[list[tuple[int, ...]]]
"""Per layer and expert the hosts that hold it, ascending."""


def spread_copies(
    copies: Sequence[Sequence[int]], weights: Sequence[int], caps: Sequence[int], widths: Sequence[int]
) -> Holders | None:
    """Hosts for ``copies[layer][expert]`` copies of every expert, None if the hosts have no room for them.

    Hosts share every layer in proportion to ``weights``, and hold no more than ``caps`` experts.
    ``widths`` gives the number of hosts on each node: copies go to as many distinct nodes as all experts can
    have, and to the same node only beyond that. A single node of all hosts: no regard to nodes.
    """
    for nodes in range(min(len(widths), max(map(max, copies))), 1, -1):
        if found := _over_nodes(copies, weights, caps, widths, nodes):
            return found
    flat = [copy for row in copies for copy in row]
    totals = apportion_copies(flat, weights, caps)
    return deal(copies, totals, _nodes(widths)) if sum(totals) == sum(flat) else None


def _over_nodes(
    copies: Sequence[Sequence[int]],
    weights: Sequence[int],
    caps: Sequence[int],
    widths: Sequence[int],
    nodes: int,
) -> Holders | None:
    """The first ``nodes`` copies of every expert on distinct nodes, further ones wherever there is room."""
    ends = list(accumulate(widths))
    parts = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
    apart = [[min(copy, nodes) for copy in row] for row in copies]
    flat = [copy for row in apart for copy in row]
    totals = apportion_copies(
        flat, [sum(weights[part]) for part in parts], [sum(caps[part]) for part in parts]
    )
    if sum(totals) < sum(flat):
        return None
    by_node = deal(apart, totals, range(len(widths)))
    hosts: list[list[list[int]]] = [[[] for _ in row] for row in copies]
    for node, (part, total) in enumerate(zip(parts, totals, strict=True)):
        here = [[expert for expert, chosen in enumerate(row) if node in chosen] for row in by_node]
        inside = apportion(total, weights[part], caps[part])
        dealt = deal([[1] * len(experts) for experts in here], inside, range(len(inside)))
        for layer, experts in enumerate(here):
            for expert, (host,) in zip(experts, dealt[layer], strict=True):
                hosts[layer][expert].append(part.start + host)
    if not _add_further(hosts, copies, weights, caps, _nodes(widths)):
        return None
    return [[tuple(sorted(chosen)) for chosen in row] for row in hosts]


def _add_further(
    hosts: list[list[list[int]]],
    copies: Sequence[Sequence[int]],
    weights: Sequence[int],
    caps: Sequence[int],
    node_of: Sequence[int],
) -> bool:
    """Add the hosts of the copies that are missing; whether there was room for all."""
    free = list(caps)
    for chosen in (chosen for row in hosts for chosen in row):
        for host in chosen:
            free[host] -= 1
    for row, wanted in zip(hosts, copies, strict=True):
        load = [sum(host in chosen for chosen in row) for host in range(len(caps))]
        for chosen, copy in zip(row, wanted, strict=True):
            for _ in range(copy - len(chosen)):
                nodes = {node_of[host] for host in chosen}
                # A fresh node first, then whoever would have the least work in this layer.
                able = [
                    (node_of[host] in nodes, (load[host] + 1) / max(1, weights[host]), host)
                    for host, room in enumerate(free)
                    if room > 0 and host not in chosen
                ]
                if not able:
                    return False
                best = min(able)[2]
                chosen.append(best)
                free[best] -= 1
                load[best] += 1
    return True


def _nodes(widths: Sequence[int]) -> list[int]:
    """Per host the position of its node."""
    return [node for node, width in enumerate(widths) for _ in range(width)]
