"""`expertmesh learn experts`: which experts a domain of the stream is about."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from cluster.errors import LearningError
from cluster.learning.choose import Chosen, choose
from cluster.learning.filters import FilterSettings, filtered
from cluster.learning.records import Record, with_feedback
from cluster.learning.select import most_uncertain
from cluster.learning.split import holdout_of
from cluster.learning.stream import Stream
from workloads.plots import pyplot_for_files

# Of one text that are counted: enough to see what it is about.
_MOST_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """Which experts are for a domain, and on what that rests."""

    domain: str
    against: tuple[str, ...]
    """Domains of the old data."""
    tokens: tuple[int, int]
    """Counted of the new data and of the old."""
    reach: float
    chosen: tuple[Chosen, ...]
    experts: int
    """Of all layers."""
    counts: Mapping[int, Sequence[int]]
    """Layer index → how often each expert was chosen for the new data."""
    background: Mapping[int, Sequence[int]]
    """The same for the old."""

    @property
    def share(self) -> float:
        """Of all experts."""
        return len(self.chosen) / self.experts


def domains_of(stream: Stream, holdout: float) -> dict[str, list[Record]]:
    """Domain → samples that may be learnt from. LearningError if there are none."""
    samples = with_feedback(record for _, shard in stream.after(0) for record in shard)
    learnt = [r for r in samples if not holdout or holdout_of(r.text, holdout, 1) is None]
    found: dict[str, list[Record]] = {}
    for record in filtered(learnt, FilterSettings()).kept:
        found.setdefault(record.domain, []).append(record)
    if not found:
        raise LearningError(
            f"{stream.url} holds nothing to learn from", "add some: `expertmesh learn ingest`"
        )
    return found


@dataclass(frozen=True, slots=True)
class Samples:
    """What is to be learnt, and what is known already."""

    domain: str
    new: Sequence[Record]
    old: Mapping[str, Sequence[Record]]
    """By domain."""


def samples_for(domains: Mapping[str, Sequence[Record]], domain: str, against: Sequence[str]) -> Samples:
    """A domain's samples, and those of others: of all others by default.

    LearningError for a domain that the stream does not have, or if there is nothing to compare with.
    """
    known = ", ".join(sorted(domains))
    for name in (domain, *against):
        if name not in domains:
            raise LearningError(
                f"the stream has no domain {name!r} with anything to learn from", f"it has: {known}"
            )
    others = tuple(against) or tuple(sorted(set(domains) - {domain}))
    if not others or domain in others:
        raise LearningError(
            f"{domain} is to be compared with {'itself' if others else 'nothing'}",
            "add a text of another kind to the stream, or name another domain with --against",
        )
    return Samples(domain, domains[domain], {name: domains[name] for name in others})


def experts_for(
    model: Any,
    encode: Callable[[str], list[int]],
    samples: Samples,
    *,
    reach: float,
    tokens: int,
    seed: int,
    progress: Callable[[str, float], None],
    most: int | None = None,
) -> ExpertChoice:
    """Which experts the new samples are about, more than the old ones, counted over so many tokens of each.

    `most`: experts of all layers together.
    """
    from actors.text_routing import choices

    dice = random.Random(seed)
    new = _drawn([samples.new], encode, tokens, dice)
    old = _drawn(list(samples.old.values()), encode, tokens, dice)
    progress("counting the new data", 0.0)
    counts = choices(model, _told(new, progress, "counting the new data"))
    background = choices(model, _told(old, progress, "counting the old data"))
    return ExpertChoice(
        samples.domain,
        tuple(samples.old),
        (sum(map(len, new)), sum(map(len, old))),
        reach,
        choose(counts, background, reach=reach, most=most),
        sum(map(len, counts.values())),
        counts,
        background,
    )


def unsure(
    model: Any,
    encode: Callable[[str], list[int]],
    samples: Sequence[Record],
    share: float,
    progress: Callable[[str, float], None],
) -> list[Record]:
    """The samples that a model is least sure of, so many of all. LearningError if it can read none."""
    from actors.version_comparison import bits_of

    surprises = []
    for number, sample in enumerate(samples, 1):
        tokens = encode(sample.text)[:_MOST_TOKENS]
        surprises.append(bits_of(model, tokens) / (len(tokens) - 1) if len(tokens) > 1 else math.nan)
        progress("what the model is unsure of", number / len(samples))
    return [samples[number] for number in most_uncertain(surprises, share)]


def clones_for(
    model: Any,
    encode: Callable[[str], list[int]],
    samples: Samples,
    choice: ExpertChoice,
    room: Callable[[int], int],
    *,
    tokens: int,
    seed: int,
) -> dict[tuple[int, int], Any]:
    """(Layer, expert) → the row of the router of its clone, of those that what is known needs as they are.

    `room`: how many a layer may still have, those that are asked for most go first.
    """
    from actors.router_review import clone_rows

    wanted: list[tuple[int, int]] = []
    for layer in choice.counts:
        heavy = [one for one in choice.chosen if one.layer == layer and one.clone]
        heavy.sort(key=lambda one: -one.gain)
        wanted += [(layer, one.expert) for one in heavy[: room(layer)]]
    dice = random.Random(seed)
    new = _drawn([samples.new], encode, tokens, dice)
    return clone_rows(model, wanted, new, _drawn(list(samples.old.values()), encode, tokens, dice))


def as_json(choice: ExpertChoice) -> dict[str, Any]:
    """For a program."""
    chosen = [{**asdict(one), "gain": one.gain} for one in choice.chosen]
    return {**asdict(choice), "chosen": chosen, "share": choice.share}


def as_table(choice: ExpertChoice) -> Table:
    """For a terminal: one row a layer."""
    table = Table("layer", "experts to train (share of the new data, of the old)", "to be cloned")
    for layer in choice.counts:
        mine = [one for one in choice.chosen if one.layer == layer]
        table.add_row(
            str(layer),
            ", ".join(f"{one.expert} ({one.share:.0%}, {one.background:.0%})" for one in mine),
            ", ".join(str(one.expert) for one in mine if one.clone),
        )
    return table


def plot(choice: ExpertChoice, file: Path) -> None:
    """A heat map of how much more each expert is asked by the new data than by the old; the chosen are marked.

    ConfigError if matplotlib is not installed.
    """
    import numpy as np

    plt = pyplot_for_files()
    layers = list(choice.counts)
    widest = max(len(counts) for counts in choice.counts.values())
    gains = np.full((len(layers), widest), np.nan)
    for row, layer in enumerate(layers):
        new, old = (np.array(of[layer], float) for of in (choice.counts, choice.background))
        gains[row, : len(new)] = new / new.sum() - old / old.sum()
    figure, axes = plt.subplots(figsize=(2 + widest * 0.35, 1.5 + len(layers) * 0.25))
    bound = float(np.nanmax(np.abs(gains))) or 1.0
    image = axes.imshow(gains, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.scatter(
        [one.expert for one in choice.chosen],
        [layers.index(one.layer) for one in choice.chosen],
        marker="s",
        facecolors="none",
        edgecolors="black",
    )
    axes.set(xlabel="expert", ylabel="layer", title=f"{choice.domain} against {', '.join(choice.against)}")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(image, label="share of choices, more than before")
    figure.savefig(file, bbox_inches="tight", dpi=110)
    plt.close(figure)


def _drawn(
    of: Sequence[Sequence[Record]], encode: Callable[[str], list[int]], tokens: int, dice: random.Random
) -> list[list[int]]:
    """Texts by lot, in turns from each domain, until there are so many tokens, or none are left."""
    left = [dice.sample(list(records), len(records)) for records in of]
    found: list[list[int]] = []
    count = 0
    while any(left) and count < tokens:
        for records in left:
            if records and count < tokens:
                text = encode(records.pop().text)[: min(_MOST_TOKENS, tokens - count)]
                found.append(text)
                count += len(text)
    return found


def _told(
    texts: Sequence[list[int]], progress: Callable[[str, float], None], what: str
) -> Iterable[list[int]]:
    for number, text in enumerate(texts, 1):
        yield text
        progress(what, number / len(texts))
