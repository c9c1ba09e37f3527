"""Which hosts hold experts that have equally many copies each. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from cluster.apportion import apportion, spread_rounds


def even_copies(
    sizes: Sequence[int], copies: int, weights: Sequence[int], caps: Sequence[int], widths: Sequence[int]
) -> list[list[tuple[int, ...]]] | None:
    """Per layer and host the experts that it holds, for layers of ``sizes`` experts.

    Hosts share every layer in proportion to ``weights``, equal ones within one of each other, and hold no
    more than ``caps`` experts. ``widths`` gives the number of hosts on each node, those of a node side by
    side; no node holds an expert twice, unless there is one node only. None if there is no room for that.
    """
    units = sum(sizes)
    caps = [min(units, cap) for cap in caps]
    if copies == 1 or len(widths) == 1:
        if sum(caps) < copies * units:
            return None
        table = spread_rounds(sizes, apportion(copies * units, weights, caps))
    else:
        ends = list(accumulate(widths))
        parts = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
        node_caps = [min(units, sum(caps[part])) for part in parts]
        if sum(node_caps) < copies * units:
            return None
        totals = apportion(copies * units, [sum(weights[part]) for part in parts], node_caps)
        per_node = spread_rounds(sizes, totals)
        table = [[] for _ in sizes]
        for index, (part, total) in enumerate(zip(parts, totals, strict=True)):
            shares = apportion(total, weights[part], caps[part])
            inside = spread_rounds([row[index] for row in per_node], shares)
            for row, share in zip(table, inside, strict=True):
                row.extend(share)
    return [_runs(size, row) for size, row in zip(sizes, table, strict=True)]


def _runs(num_experts: int, counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Which experts each host holds: consecutive ones, wrapping round (McNaughton's rule).

    Copies of an expert are ``num_experts`` positions apart, so neither a host, nor the hosts of a node side
    by side, hold one twice as long as together they hold at most ``num_experts``.
    """
    held, start = [], 0
    for count in counts:
        held.append(tuple(sorted((start + i) % num_experts for i in range(count))))
        start += count
    return held
