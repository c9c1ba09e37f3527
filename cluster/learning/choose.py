"""Which experts are to learn something new: those that the router asks for it more than for what is known.

After ESFT (Wang et al., "Let the Expert Stick to His Last", 2024), which takes the experts with the largest share of a
task's routing. Here the share that an expert has of the old data is taken off first, so that what is asked for
everything is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import LearningError


@dataclass(frozen=True, slots=True)
class Chosen:
    """An expert that is to be trained."""

    layer: int
    expert: int
    share: float
    """Of its layer's choices on the new data, 0 to 1."""
    background: float
    """The same on the old data."""
    clone: bool
    """Whether old data needs it as it is, so that a copy is trained in its place."""

    @property
    def gain(self) -> float:
        """By how much the new data asks for it more."""
        return self.share - self.background


def choose(
    new: Mapping[int, Sequence[int]],
    old: Mapping[int, Sequence[int]],
    *,
    reach: float = 0.2,
    heavy: float = 1.0,
    most: int | None = None,
) -> tuple[Chosen, ...]:
    """Per layer the fewest experts that make up a part `reach` of all that the new data asks for more than the old.

    `new` and `old`: layer index → how often each expert was chosen. An expert whose share of the old data is at least
    `heavy` times an even one is cloned. Where nothing is asked for more, nothing is chosen. `most`: experts of all
    layers together, those that are asked for more by most.

    LearningError for counts of different layers or sizes, a layer that nobody asked anything, or a `reach` that is no
    part.
    """
    if not 0 < reach <= 1:
        raise LearningError(f"{reach:g} is no part of a whole", "give more than 0, and 1 at most")
    if new.keys() != old.keys():
        raise LearningError("the counts are of different layers", "count both with the same model")
    found: list[Chosen] = []
    for layer in sorted(new):
        shares, background = _shares(new[layer], layer), _shares(old[layer], layer)
        if len(shares) != len(background):
            raise LearningError(
                f"layer {layer} has {len(shares)} experts in one count and {len(background)} in the other",
                "count both with the same version",
            )
        gains = [max(0.0, mine - theirs) for mine, theirs in zip(shares, background, strict=True)]
        left = reach * sum(gains)
        for expert in sorted(range(len(gains)), key=lambda expert: (-gains[expert], expert)):
            if left <= 0 or gains[expert] <= 0:
                break
            left -= gains[expert]
            needed = background[expert] >= heavy / len(shares)
            found.append(Chosen(layer, expert, shares[expert], background[expert], needed))
    if most is not None and len(found) > most:
        found = sorted(sorted(found, key=lambda one: -one.gain)[:most], key=lambda one: one.layer)
    return tuple(found)


def _shares(counts: Sequence[int], layer: int) -> list[float]:
    total = sum(counts)
    if not total:
        raise LearningError(f"nothing was counted in layer {layer}", "count over more text")
    return [count / total for count in counts]
