"""Divide whole things in proportion: the arithmetic under the placement, exact in integers."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Divide ``total`` in proportion to ``weights``, none above its cap; what caps keep out goes to others.

    Largest-remainder method (Hamilton): every uncapped share is its exact quota rounded down or up. Ties go
    to the first. ValueError if the caps admit less than ``total``.
    """
    if sum(caps) < total:
        raise ValueError(f"the caps admit {sum(caps)} of {total}")
    shares = [0] * len(weights)
    # A party of weight 0 must still take part where the caps leave no other way.
    weights = [max(1, weight) for weight in weights]
    active = list(range(len(weights)))
    left = total
    while True:
        weight = sum(weights[i] for i in active)
        full = [i for i in active if left * weights[i] >= caps[i] * weight]
        if not full or not active:
            break
        for i in full:
            shares[i] = caps[i]
        left -= sum(caps[i] for i in full)
        active = [i for i in active if i not in full]
    remainders = {}
    for i in active:
        shares[i], remainders[i] = divmod(left * weights[i], weight)
    missing = total - sum(shares)
    for i in sorted(active, key=lambda i: -remainders[i])[:missing]:
        shares[i] += 1
    return shares


def spread_rounds(rounds: Sequence[int], totals: Sequence[int]) -> list[list[int]]:
    """Divide each party's total over rounds of given sizes so that every round is divided alike.

    ``sum(totals)`` must be a multiple (the number of copies) of ``sum(rounds)``, and no total above the
    latter; round r then hands out ``copies * rounds[r]``, to none more than ``rounds[r]``. Dividing what
    remains anew in each round keeps all sums exact, and equal parties within one of each other throughout.
    """
    remaining = list(totals)
    left = sum(rounds)
    copies = sum(totals) // left if left else 0
    table = []
    for size in rounds:
        row, remainders = [], []
        for total in remaining:
            whole, remainder = divmod(total * size, max(1, left))
            row.append(whole)
            remainders.append(remainder)
        missing = copies * size - sum(row)
        for i in sorted(range(len(row)), key=lambda i: -remainders[i])[:missing]:
            row[i] += 1
        remaining = [total - share for total, share in zip(remaining, row, strict=True)]
        left -= size
        table.append(row)
    return table
