"""What a training came to: judged on held-out texts, and published where the gate lets it through."""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.learning.judge import GateVerdict, Judged, imbalance, judge, touched
from cluster.learning.records import Record
from cluster.versions.publish import publish

if TYPE_CHECKING:
    from actors.bias_balance import BiasBalance
    from actors.expert_slices import ChosenExperts
    from actors.trainable_version import Encode
    from actors.training_job import Saved, TrainingJob
    from actors.version_comparison import Comparison
    from workloads.learn_workshop import Workshop


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the gate says, and what of the model it is about."""

    verdict: GateVerdict
    trained_share: float
    """Of the model's weights."""
    manifest: str = ""
    """Of the version that was published; "" where the gate did not let it through."""


def judge_learnt(
    workshop: Workshop,
    job: TrainingJob,
    saved: Saved,
    domain: str,
    held: Mapping[str, Sequence[Record]],
    *,
    seed: int,
    created: float | None = None,
) -> Judgement:
    """What the gate says of what was learnt, which is published if it passes.

    Published twice with the same `created` (seconds since 1970) it is the same version.
    """
    from actors.bias_balance import BiasBalance
    from actors.router_review import reviewed
    from actors.trainable_version import open_encoder
    from actors.training_run import open_job

    workshop.progress("the gate", 0.0)
    encode = open_encoder(workshop.checkpoint)
    judged = {name: _for_gate(workshop, records, encode, seed) for name, records in held.items()}
    model, chosen = open_job(job, workshop.files(job.name))
    chosen.load(saved["training"]["masters"])
    # What is judged is what will serve, and not what was still finer.
    chosen.round_to(workshop.checkpoint)
    before, biases = [chosen.as_before], None
    if job.review is not None:
        routers = reviewed(model, workshop.checkpoint, saved["review"])
        biases = BiasBalance(model, 0.0)
        biases.load(saved["biases"])
        biases.round_to(workshop.checkpoint)
        before += [routers.as_before, biases.as_before]
    found, read = _compared(workshop, model, _all_of(before), judged)
    known = [read[name] for name in held if name != domain]
    counts = [one.before for one in known], [one.after for one in known]
    verdict = judge(
        domain,
        found,
        workshop.gate,
        # Of domains with as many tokens each, near enough.
        divergence=sum(one.divergence for one in known) / max(1, len(known)),
        imbalance=imbalance(*counts),
        touched=touched(*counts, workshop.checkpoint.top_k),
    )
    share = chosen.share
    manifest = ""
    if verdict.passed:
        manifest = _publish(workshop, model, chosen, biases, job, domain, verdict, created)
    del model, chosen, before, biases
    gc.collect()
    return Judgement(verdict, share, manifest)


def _publish(
    workshop: Workshop,
    model: Any,
    chosen: ChosenExperts,
    biases: BiasBalance | None,
    job: TrainingJob,
    domain: str,
    verdict: GateVerdict,
    created: float | None,
) -> str:
    from safetensors.torch import save_file

    from actors.router_review import router_tensors
    from actors.text_routing import expert_modules

    tensors = chosen.tensors(workshop.checkpoint)
    routers = set(expert_modules(model)) if job.review else {layer for layer, _ in job.clones}
    if routers:
        tensors |= router_tensors(model, workshop.checkpoint, routers)
    if biases is not None:
        tensors |= biases.tensors(workshop.checkpoint)
    with tempfile.TemporaryDirectory(prefix="expertmesh-learn-") as folder:
        file = Path(folder) / "learnt.safetensors"
        save_file(tensors, file)
        return publish(
            workshop.store,
            workshop.checkpoint,
            file,
            parent=job.parent,
            author=workshop.author,
            reason=f"learnt {domain}",
            metrics={**verdict.metrics, "trained_share": chosen.share},
            created=created,
        ).digest


def _for_gate(
    workshop: Workshop, records: Sequence[Record], encode: Encode, seed: int
) -> list[tuple[str, list[int]]]:
    """Texts with their tokens."""
    wanted = workshop.settings.gate
    picked = random.Random(seed).sample(list(records), min(wanted.texts, len(records)))
    found = [(record.text, encode(record.text)) for record in picked]
    return [(text, tokens[: wanted.tokens]) for text, tokens in found if len(tokens) > 1]


def _compared(
    workshop: Workshop,
    model: Any,
    as_before: Callable[[], AbstractContextManager[None]],
    judged: Mapping[str, Sequence[tuple[str, list[int]]]],
) -> tuple[dict[str, list[Judged]], dict[str, Comparison]]:
    """Every held-out text by the version before and by what was learnt, by domain."""
    from actors.version_comparison import compare

    count, done = sum(map(len, judged.values())), 0

    def told() -> None:
        nonlocal done
        done += 1
        workshop.progress("the gate", done / count)

    read = {
        name: compare(model, as_before, [tokens for _, tokens in texts], told)
        for name, texts in judged.items()
    }
    found = {
        name: [
            Judged(len(text.encode()), *bits) for (text, _), bits in zip(texts, read[name].bits, strict=True)
        ]
        for name, texts in judged.items()
    }
    return found, read


def _all_of(
    contexts: Sequence[Callable[[], AbstractContextManager[None]]],
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return entered
