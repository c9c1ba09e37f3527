"""`expertmesh learn run`: from a domain of the stream to a version of the model, if the gate lets it through.

1. samples are split: what is held out judges, the rest is learnt
2. the experts that the domain is about are chosen
3. they are trained on it, with what is known beside it
4. the gate compares bits per byte before and after, in the domain and in all others
5. what passes is published, with the gate's numbers; nothing serves it yet
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.checkpoint import Checkpoint
from cluster.errors import LearningError
from cluster.learning.filters import FilterSettings, filtered
from cluster.learning.judge import GateSettings, GateVerdict, Judged, judge
from cluster.learning.records import Record, with_feedback
from cluster.learning.reservoir import Reservoir
from cluster.learning.split import holdout_of
from cluster.learning.stream import Stream
from cluster.versions.publish import publish
from cluster.versions.store import Store
from workloads.learn_experts import ExpertChoice, Samples, domains_of, experts_for, samples_for

if TYPE_CHECKING:
    import torch

    from actors.expert_slices import ChosenExperts
    from actors.expert_training import Trained, TrainSettings

Progress = Callable[[str, float], None]

# Held-out texts of a domain that are judged by, and tokens of each.
_MOST_JUDGED: Final = 48
_JUDGED_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a domain is learnt."""

    domain: str
    against: tuple[str, ...] = ()
    reach: float = 0.2
    count_tokens: int = 20_000
    """Of each side, by which experts are chosen."""
    rows: int = 8
    """Of a step."""
    length: int = 128
    """Tokens of a row."""
    replay: float = 0.25
    """Share of the rows that are of what is known."""
    reservoir: int = 2000
    seed: int = 0
    gate: GateSettings = field(default_factory=GateSettings)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    choice: ExpertChoice
    trained_share: float
    """Of the model's weights."""
    steps: tuple[Trained, ...]
    verdict: GateVerdict
    manifest: str = ""
    """Of the version; "" where the gate did not let it through."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a run has to go on."""

    samples: Samples
    held: Mapping[str, Sequence[Record]]
    """By domain, of the new one and the old ones: what judges."""


def material_of(stream: Stream, holdout: float, settings: RunSettings) -> Material:
    """What the stream has for a run; looked at before a model is loaded.

    LearningError if there is too little of anything.
    """
    samples = samples_for(domains_of(stream, holdout), settings.domain, settings.against)
    held = held_out(stream, holdout)
    needed = settings.gate.fewest_texts
    for name in (settings.domain, *samples.old):
        if (count := len(held.get(name, ()))) < needed:
            raise LearningError(
                f"{count} held-out texts of {name} say too little, {needed} are asked for",
                "add more texts of it to the stream, or hold out a larger share (learning.holdout)",
            )
    return Material(samples, {name: held[name] for name in (settings.domain, *samples.old)})


def learn(
    checkpoint: Checkpoint,
    model: Any,
    encode: Callable[[str], list[int]],
    material: Material,
    store: Store,
    settings: RunSettings,
    training: TrainSettings,
    *,
    author: str,
    progress: Progress,
) -> Outcome:
    """Learn a domain once, from the base checkpoint."""
    from actors.expert_slices import ChosenExperts
    from actors.expert_training import Training, divergence
    from actors.text_routing import choices

    samples = material.samples
    choice = experts_for(
        model,
        encode,
        samples,
        reach=settings.reach,
        tokens=settings.count_tokens,
        seed=settings.seed,
        progress=progress,
    )
    judged = {name: _for_gate(records, encode, settings) for name, records in material.held.items()}
    chosen = ChosenExperts(model, [(one.layer, one.expert) for one in choice.chosen])
    old = Reservoir(settings.reservoir, settings.seed)
    old.add(record for records in samples.old.values() for record in records)
    rows = _rows(samples.new, old, encode, settings)
    learner = Training(model, chosen, training)
    model.train()
    steps = []
    for number in range(training.steps):
        steps.append(learner.train(next(rows)))
        progress("training", (number + 1) / training.steps)
    model.eval()
    progress("the gate", 0.0)
    known = [tokens for name in choice.against for _, tokens in judged[name]]
    with chosen.as_before():
        before = choices(model, known)
    verdict = judge(
        settings.domain,
        _compared(model, chosen, judged, progress),
        settings.gate,
        divergence=divergence(model, chosen, known),
        imbalance=_imbalance(before, choices(model, known)),
    )
    if not verdict.passed:
        return Outcome(choice, chosen.share, tuple(steps), verdict)
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="expertmesh-learn-") as folder:
        file = Path(folder) / "learnt.safetensors"
        save_file(chosen.tensors(checkpoint), file)
        made = publish(
            store,
            checkpoint,
            file,
            author=author,
            reason=f"learnt {settings.domain}",
            metrics={**verdict.metrics, "trained_share": chosen.share},
        )
    return Outcome(choice, chosen.share, tuple(steps), verdict, made.digest)


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """For a program."""
    return {
        "manifest": outcome.manifest,
        "passed": outcome.verdict.passed,
        "reasons": list(outcome.verdict.reasons),
        "metrics": dict(outcome.verdict.metrics),
        "trained_share": outcome.trained_share,
        "experts": [[one.layer, one.expert] for one in outcome.choice.chosen],
        "steps": [asdict(step) for step in outcome.steps],
    }


def outcome_text(outcome: Outcome) -> str:
    """For a person."""
    metrics, first, last = outcome.verdict.metrics, outcome.steps[0], outcome.steps[-1]
    lines = [
        f"{len(outcome.choice.chosen)} of {outcome.choice.experts} experts, {outcome.trained_share:.1%} of weights, "
        f"{last.step} steps: {first.cross_entropy:.3f} to {last.cross_entropy:.3f} nats a token"
    ]
    for name in (outcome.choice.domain, *outcome.choice.against):
        before, after = (metrics[f"bits_per_byte.{name}.{when}"] for when in ("before", "after"))
        lines.append(f"  {name}: {before:.4f} to {after:.4f} bits per byte")
    lines += [f"  not published: {reason}" for reason in outcome.verdict.reasons]
    if outcome.manifest:
        lines.append(f"{outcome.manifest} is published: `expertmesh versions stage {outcome.manifest[:12]}`")
    return "\n".join(lines)


def held_out(stream: Stream, holdout: float) -> dict[str, list[Record]]:
    """Domain → samples that are never learnt from."""
    samples = with_feedback(record for _, shard in stream.after(0) for record in shard)
    kept = [r for r in samples if holdout and holdout_of(r.text, holdout, 1) is not None]
    found: dict[str, list[Record]] = {}
    for record in filtered(kept, FilterSettings(most_of_one=len(kept) + 1)).kept:
        found.setdefault(record.domain, []).append(record)
    return found


def _for_gate(
    records: Sequence[Record], encode: Callable[[str], list[int]], settings: RunSettings
) -> list[tuple[str, list[int]]]:
    """Texts with their tokens."""
    picked = random.Random(settings.seed).sample(list(records), min(_MOST_JUDGED, len(records)))
    found = [(record.text, encode(record.text)) for record in picked]
    return [(text, tokens[:_JUDGED_TOKENS]) for text, tokens in found if len(tokens) > 1]


def _rows(
    new: Sequence[Record], old: Reservoir, encode: Callable[[str], list[int]], settings: RunSettings
) -> Iterator[torch.Tensor]:
    """Steps of rows [B, T]: packed from whole samples by lot, a share of them of what is known."""
    import torch

    replayed = round(settings.rows * settings.replay)
    if settings.replay and not replayed:
        replayed = 1
    dice = random.Random(settings.seed)
    fresh = _packed(lambda: dice.choice(new).text, encode, settings.length)
    known = _packed(lambda: old.draw(1)[0].text, encode, settings.length)
    while True:
        rows = [next(fresh) for _ in range(settings.rows - replayed)] + [next(known) for _ in range(replayed)]
        yield torch.tensor(rows)


def _packed(draw: Callable[[], str], encode: Callable[[str], list[int]], length: int) -> Iterator[list[int]]:
    waiting: list[int] = []
    empty = 0
    while True:
        while len(waiting) < length:
            tokens = encode(draw())
            empty = 0 if tokens else empty + 1
            if empty > 1000:
                raise LearningError("the samples have no tokens", "look at the texts and the tokenizer")
            waiting += tokens
        yield waiting[:length]
        waiting = waiting[length:]


def _compared(
    model: Any,
    chosen: ChosenExperts,
    judged: Mapping[str, Sequence[tuple[str, list[int]]]],
    progress: Progress,
) -> dict[str, list[Judged]]:
    """Bits of every held-out text, by the version before and by what was learnt."""
    from actors.expert_training import bits_of

    found: dict[str, list[Judged]] = {}
    for number, (name, texts) in enumerate(judged.items(), 1):
        with chosen.as_before():
            before = [bits_of(model, tokens) for _, tokens in texts]
        after = [bits_of(model, tokens) for _, tokens in texts]
        found[name] = [
            Judged(len(text.encode()), one, other)
            for (text, _), one, other in zip(texts, before, after, strict=True)
        ]
        progress("the gate", number / len(judged))
    return found


def _imbalance(before: Mapping[int, Sequence[int]], after: Mapping[int, Sequence[int]]) -> float:
    """The largest rise of a layer's largest share, as a factor."""
    return max(
        (max(after[layer]) / sum(after[layer])) / (max(before[layer]) / sum(before[layer]))
        for layer in before
    )
