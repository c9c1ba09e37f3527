"""Whether what was learnt may be served: by held-out text of what was to be learnt and of all that was known before.

Bounds are of a bootstrap over texts (Efron, "Bootstrap Methods", 1979), each drawn with both versions' bits, so that
texts which are hard for both weigh on neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from cluster.errors import LearningError

_DRAWS: Final = 2000


class Judged(NamedTuple):
    """One held-out text."""

    size: int
    """Bytes."""
    before: float
    """Bits that the version before takes for it."""
    after: float


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What is asked of a version."""

    level: float = 0.95
    """Of the bounds, each one-sided."""
    most_rise: float = 0.01
    """By which a domain that was known may become worse, of its bits per byte."""
    most_divergence: float = 0.5
    """KL from the version before on known text, nats per token."""
    most_imbalance: float = 1.5
    """Rise of the largest share of a layer's choices that one expert gets, as a factor."""
    fewest_texts: int = 8
    most_touched: float = 1.25
    """Rise of the experts that a step of a few requests reads, as a factor: it bounds the time between tokens."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over texts and its one-sided bounds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """What the gate says, and all that it rests on."""

    passed: bool
    reasons: tuple[str, ...]
    """Why it does not pass; none where it does."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """For the version's manifest."""


def judge(
    target: str,
    domains: Mapping[str, Sequence[Judged]],
    settings: GateSettings,
    *,
    divergence: float,
    imbalance: float,
    touched: float,
) -> GateVerdict:
    """Whether a version is better in the domain `target`, and no worse in the others.

    `domains`: by name, held-out texts of the target, of everything that was learnt before, and of a general set.
    LearningError if there is nothing of the target, or too few texts of any.
    """
    if target not in domains:
        raise LearningError(f"there are no held-out texts of {target}", "add more texts of it to the stream")
    for name, texts in domains.items():
        if len(texts) < settings.fewest_texts:
            raise LearningError(
                f"{len(texts)} held-out texts of {name} say too little, {settings.fewest_texts} are asked for",
                "add more texts of it to the stream, or hold out a larger share",
            )
    reasons: list[str] = []
    metrics: dict[str, float] = {"divergence": divergence, "imbalance": imbalance, "touched": touched}
    for name, texts in sorted(domains.items()):
        bits = _bits(texts)
        metrics[f"bits_per_byte.{name}.before"], metrics[f"bits_per_byte.{name}.after"] = bits
        if not all(map(math.isfinite, bits)):
            reasons.append(f"{name}: the bits per byte are {bits[1]:g}")
            continue
        rise = rises(texts, settings)
        metrics[f"rise.{name}"], metrics[f"rise.{name}.low"], metrics[f"rise.{name}.high"] = (
            rise.mean,
            rise.low,
            rise.high,
        )
        if name == target and rise.high >= 0:
            reasons.append(
                f"{name}: it is not better for sure ({rise.mean:+.2%} bits per byte, {rise.high:+.2%} at most)"
            )
        elif name != target and rise.high > settings.most_rise:
            reasons.append(
                f"{name}: {rise.mean:+.2%} bits per byte, {rise.high:+.2%} at most, "
                f"where {settings.most_rise:+.2%} is tolerable"
            )
    if not divergence <= settings.most_divergence:
        reasons.append(f"it diverges from the version before by {divergence:.3g} nats a token")
    if not imbalance <= settings.most_imbalance:
        reasons.append(f"one expert gets {imbalance:.2f} times the share of its layer that any got before")
    if not touched <= settings.most_touched:
        reasons.append(f"a step reads {touched:.2f} times as many experts as before, so that it takes longer")
    return GateVerdict(not reasons, tuple(reasons), metrics)


def rises(texts: Sequence[Judged], settings: GateSettings) -> Interval:
    """By how much the bits per byte rose, of those before: -0.1 is a tenth better."""
    bits = np.array([(text.before, text.after) for text in texts])
    drawn = np.random.default_rng(settings.seed).integers(0, len(texts), (_DRAWS, len(texts)))
    sums = bits[drawn].sum(axis=1)
    found = sums[:, 1] / sums[:, 0] - 1
    whole = bits.sum(axis=0)
    return Interval(
        float(whole[1] / whole[0] - 1),
        float(np.quantile(found, 1 - settings.level)),
        float(np.quantile(found, settings.level)),
    )


def _bits(texts: Sequence[Judged]) -> tuple[float, float]:
    size = sum(text.size for text in texts)
    return sum(text.before for text in texts) / size, sum(text.after for text in texts) / size


Counts = Sequence[Mapping[int, Sequence[int]]]
"""Of each text or domain: layer index → how often each expert was chosen."""


def imbalance(before: Counts, after: Counts) -> float:
    """The largest rise of a layer's largest share of choices, as a factor; 1 where nothing was counted."""
    found = [
        float(now.max() / then.max())
        for layer in (before[0] if before else ())
        if (then := _shares(before, layer)).any() and (now := _shares(after, layer)).any()
    ]
    return max(found, default=1.0)


def touched(before: Counts, after: Counts, top_k: int, rows: int = 16) -> float:
    """The rise of the experts of all layers that a step of so many tokens reads, as a factor.

    Of tokens that choose independently of each other, an expert with the share s of the choices is left alone by all
    with the probability (1 - top_k * s) ** rows.
    """
    then, now = (
        sum(
            float((1 - (1 - np.minimum(1.0, top_k * _shares(counts, layer))) ** rows).sum())
            for layer in (counts[0] if counts else ())
        )
        for counts in (before, after)
    )
    return now / then if then else 1.0


def _shares(counts: Counts, layer: int) -> np.ndarray:
    """Of a layer's choices, of each expert."""
    of_experts: np.ndarray = np.sum([one[layer] for one in counts], axis=0)
    return of_experts / max(1, of_experts.sum())
