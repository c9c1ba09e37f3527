"""`expertmesh learn run`: from a domain of the stream to a version of the model, if the gate lets it through.

Samples are split first: what is held out judges, the rest is learnt. The phases are those of `learn_workshop`; begun
again after it was killed, the same run goes on where its training was put down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cluster.errors import LearningError
from cluster.learning.filters import FilterSettings, filtered
from cluster.learning.judge import GateVerdict
from cluster.learning.records import Record, with_feedback
from cluster.learning.reservoir import Reservoir
from cluster.learning.split import holdout_of
from cluster.learning.stream import Stream
from workloads.learn_experts import ExpertChoice, Samples, domains_of, samples_for
from workloads.learn_judging import judge_learnt
from workloads.learn_lesson import Lesson, choose
from workloads.learn_workshop import Workshop

if TYPE_CHECKING:
    from actors.expert_training import Trained


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
    clones: tuple[tuple[int, int], ...] = ()
    """Those of the chosen of which copies were trained in their place."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a run has to go on."""

    samples: Samples
    held: Mapping[str, Sequence[Record]]
    """By domain, of the new one and the old ones: what judges."""


def material_of(
    stream: Stream, holdout: float, domain: str, against: Sequence[str], fewest_texts: int
) -> Material:
    """What the stream has for a run; looked at before a model is loaded.

    LearningError if there is too little of anything.
    """
    samples = samples_for(domains_of(stream, holdout), domain, against)
    held = held_out(stream, holdout)
    if (short := too_few(held, (domain, *samples.old), fewest_texts)) is not None:
        raise LearningError(
            short, "add more texts of it to the stream, or hold out a larger share (learning.holdout)"
        )
    return Material(samples, {name: held[name] for name in (domain, *samples.old)})


def too_few(held: Mapping[str, Sequence[Record]], domains: Sequence[str], fewest: int) -> str | None:
    """Of which domain there are too few held-out texts to judge by; None where there are enough of all."""
    for name in domains:
        if (count := len(held.get(name, ()))) < fewest:
            return f"{count} held-out texts of {name} say too little, {fewest} are asked for"
    return None


def learn(workshop: Workshop, material: Material, seed: int) -> Outcome:
    """Learn a domain once, from the version that serves."""
    from actors.training_job import told

    parent, samples = workshop.serving(), material.samples
    workshop.check_room()
    old = Reservoir(workshop.settings.reservoir, seed)
    old.add(record for records in samples.old.values() for record in records)
    samples = Samples(samples.domain, samples.new, old.kept)
    lesson = choose(workshop, samples, parent, seed)
    name = _name(workshop, lesson, parent, seed)
    job = workshop.begin(name, lesson, parent, seed)
    saved = workshop.train(name)
    found = judge_learnt(workshop, job, saved, samples.domain, material.held, seed=seed)
    workshop.files(name).discard()
    return Outcome(lesson.choice, found.trained_share, told(saved), found.verdict, found.manifest, job.clones)


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """For a program."""
    return {
        "manifest": outcome.manifest,
        "passed": outcome.verdict.passed,
        "reasons": list(outcome.verdict.reasons),
        "metrics": dict(outcome.verdict.metrics),
        "trained_share": outcome.trained_share,
        "experts": [[one.layer, one.expert] for one in outcome.choice.chosen],
        "clones": [list(one) for one in outcome.clones],
        "steps": [asdict(step) for step in outcome.steps],
    }


def outcome_text(outcome: Outcome) -> str:
    """For a person."""
    metrics, first, last = outcome.verdict.metrics, outcome.steps[0], outcome.steps[-1]
    lines = [
        f"{len(outcome.choice.chosen)} of {outcome.choice.experts} experts, {outcome.trained_share:.1%} of weights, "
        + (f"copies of {len(outcome.clones)} in their place, " if outcome.clones else "")
        + f"{last.step} steps: {first.cross_entropy:.3f} to {last.cross_entropy:.3f} nats a token"
    ]
    for name in (outcome.choice.domain, *outcome.choice.against):
        before, after = (metrics[f"bits_per_byte.{name}.{when}"] for when in ("before", "after"))
        lines.append(f"  {name}: {before:.4f} to {after:.4f} bits per byte")
    lines += [f"  not published: {reason}" for reason in outcome.verdict.reasons]
    if outcome.manifest:
        lines.append(f"{outcome.manifest} is published: `expertmesh versions stage {outcome.manifest[:12]}`")
    return "\n".join(lines)


def held_out(stream: Stream, holdout: float, upto: int | None = None) -> dict[str, list[Record]]:
    """Domain → samples that are never learnt from, of all shards or those up to one."""
    shards = (shard for number, shard in stream.after(0) if upto is None or number <= upto)
    samples = with_feedback(record for shard in shards for record in shard)
    kept = [r for r in samples if holdout and holdout_of(r.text, holdout, 1) is not None]
    found: dict[str, list[Record]] = {}
    for record in filtered(kept, FilterSettings(most_of_one=len(kept) + 1)).kept:
        found.setdefault(record.domain, []).append(record)
    return found


def _name(workshop: Workshop, lesson: Lesson, parent: str, seed: int) -> str:
    """The same for the same run: what is begun again goes on."""
    samples = lesson.samples
    said = [
        parent,
        seed,
        workshop.settings.training.model_dump_json(),
        [(one.layer, one.expert) for one in lesson.choice.chosen],
        [astuple(record) for records in (samples.new, *samples.old.values()) for record in records],
    ]
    return f"run-{sha256(repr(said).encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
