"""Which samples are worth learning from, if there are more than time for them: those that the model is unsure of.

Uncertainty sampling (Lewis and Gale, "A Sequential Algorithm for Training Text Classifiers", 1994) by the mean
surprise of a sample's tokens. What surprises by far most is left out: it is noise more often than knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.errors import LearningError


def most_uncertain(surprises: Sequence[float], share: float, outliers: float = 0.02) -> list[int]:
    """Numbers of the samples that are to be learnt, in order; at least one.

    `surprises`: of each sample, nats per token; `share`: of the samples that is kept; `outliers`: share of those that
    surprise most, which is left out before (none where all are kept). Samples whose surprise is no number are left out.

    LearningError for a share that is none, or if none is left.
    """
    if not 0 < share <= 1 or not 0 <= outliers < 1:
        raise LearningError(f"{share:g} and {outliers:g} are no shares", "give more than 0, and 1 at most")
    order = [number for number, nats in enumerate(surprises) if math.isfinite(nats)]
    if not order:
        raise LearningError("none of the samples can be read by the model", "look at the texts")
    if share == 1:
        return order
    order.sort(key=lambda number: (-surprises[number], number))
    wanted = max(1, round(share * len(order)))
    # Only as far as there are enough others.
    skipped = min(math.floor(outliers * len(order)), len(order) - wanted)
    return sorted(order[skipped : skipped + wanted])
