"""`expertmesh bench learn`: a stream of domains, learnt one after the other in every way that is compared."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.errors import LearningError
from workloads.bench.learn_scores import Scores, gap_closed, scores
from workloads.bench.report import Bar, envelope, now

if TYPE_CHECKING:
    from workloads.bench.learn_methods import LearnSettings, Learnt
    from workloads.bench.learn_text import Domain

Progress = Callable[[str, float], None]

GENERAL: Final = "general"
OURS: Final = "ours"
_QUICK_STEPS: Final = 30
_QUICK_PRETRAINING: Final = 150
# Bars of ours.
_MOST_FORGOTTEN: Final = 0.10
_LEAST_CLOSED: Final = 0.80
_LEAST_RETAINED: Final = 0.97
_MOST_TRAINED: Final = 0.15


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a whole measurement."""

    texts: Mapping[str, Sequence[str]]
    """Domain → its texts, in the order in which they are learnt; one of them is the general set."""
    model: Path | None
    """Checkpoint folder; None: a small model that is trained first."""
    learn: LearnSettings
    seeds: int = 3
    seed: int = 0
    methods: tuple[str, ...] = ()
    """Of these names; none: all."""
    device: str = "cpu"
    jobs: int = 1
    judged_tokens: int = 16_384
    learnt_tokens: int = 1_000_000
    small_steps: int = 3000
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the domains' texts, for the report."""


def settings_for(
    folders: Sequence[Path],
    *,
    model: Path | None,
    device: str,
    jobs: int,
    seeds: int,
    seed: int,
    methods: tuple[str, ...],
    steps: int,
    rows: int,
    length: int,
    replay: float,
    quick: bool,
) -> Settings:
    """Of what the command was given; nothing is loaded yet.

    LearningError for folders with too little text or of one name, or a device that is not there.
    """
    import torch

    from workloads.bench.learn_builtin import builtin_domains
    from workloads.bench.learn_methods import LearnSettings
    from workloads.bench.learn_text import read_domain

    if device != "cpu" and not torch.cuda.is_available():
        raise LearningError(f"no device {device} here", "leave --device out for the processor")
    texts: dict[str, Sequence[str]] = {}
    for folder in folders:
        name, found = read_domain(folder)
        if name in texts:
            raise LearningError(f"two domains are named {name}", "rename one of the folders")
        texts[name] = found
    builtin = {} if GENERAL in texts and len(texts) > 1 else builtin_domains()
    if not texts:
        texts = dict(builtin)
    elif GENERAL not in texts:
        texts[GENERAL] = builtin[GENERAL]
    learn = LearnSettings(steps, rows, length, replay=replay)
    if quick:
        learn = LearnSettings(
            _QUICK_STEPS, 8, 128, replay=replay, count_tokens=4096, row_tokens=4096, fisher_rows=16
        )
    return Settings(
        texts,
        model,
        learn,
        1 if quick else seeds,
        seed,
        methods,
        device,
        jobs,
        4096 if quick else 16_384,
        200_000 if quick else 1_000_000,
        _QUICK_PRETRAINING if quick else 3000,
        {name: digest_of(found) for name, found in texts.items()},
    )


def digest_of(texts: Sequence[str]) -> str:
    """Of a domain, for the report."""
    return sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def measure(settings: Settings, progress: Progress) -> dict[str, Any]:
    """The report. LearningError if there is too little text, or an unknown method is asked for."""
    started_at = now()
    names = _names(settings)
    if GENERAL not in settings.texts or len(settings.texts) < 3:
        raise LearningError(
            f"{len(settings.texts)} domains with{'' if GENERAL in settings.texts else 'out'} {GENERAL!r} are too few",
            f"give {GENERAL!r}, on which nothing may be lost, and two more",
        )
    tasks = [(name, seed) for seed in range(settings.seed, settings.seed + settings.seeds) for name in names]
    found: dict[tuple[str, int], tuple[Learnt, float]] = {}
    if settings.jobs == 1:
        for number, (name, seed) in enumerate(tasks):
            progress(f"{name}, seed {seed}", number / len(tasks))
            found[name, seed] = _learnt(settings, name, seed, progress)
    else:
        with ProcessPoolExecutor(settings.jobs, get_context("spawn")) as pool:
            waiting = {pool.submit(_learnt, settings, name, seed): (name, seed) for name, seed in tasks}
            for number, done in enumerate(as_completed(waiting), 1):
                found[waiting[done]] = done.result()
                progress(f"{len(tasks)} runs", number / len(tasks))
    domains = [name for name in settings.texts if name != GENERAL]
    results = {name: _result([found[name, seed] for seed in _seeds(settings)]) for name in names}
    _add_gaps(results)
    return envelope(
        "bench learn",
        seed=settings.seed,
        started_at=started_at,
        series={},
        bars=bars(results),
        domains=domains,
        digests=dict(settings.digests),
        model=str(settings.model.name) if settings.model else "small",
        device=_device_name(settings.device),
        settings=asdict(settings.learn),
        seeds=settings.seeds,
        methods=results,
    )


def bars(results: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Of ours, where it was measured."""
    ours, naive = results.get(OURS), results.get("naive")
    forgot = ours["forgetting"] / naive["forgetting"] if ours and naive and naive["forgetting"] > 0 else None
    return [
        Bar("forgetting_of_naive", forgot, _MOST_FORGOTTEN, True),
        Bar("gap_closed", ours["gap_closed"] if ours else None, _LEAST_CLOSED, False),
        Bar("retention", ours["retention"] if ours else None, _LEAST_RETAINED, False),
        Bar("trained_share", ours["trained_share"] if ours else None, _MOST_TRAINED, True),
    ]


def show(report: Mapping[str, Any], console: Console) -> None:
    """For a person."""
    table = Table(
        "method", "average", "forgetting", "backward", "forward", "gap closed", "retention", "trained", "s"
    )
    for name, one in report["methods"].items():
        closed = one["gap_closed"]
        table.add_row(
            name,
            f"{one['average']:.4f}",
            f"{one['forgetting']:.4f}",
            f"{one['backward_transfer']:+.4f}",
            f"{one['forward_transfer']:+.4f}",
            "-" if closed is None else f"{closed:.0%}",
            f"{one['retention']:.1%}",
            f"{one['trained_share']:.1%}",
            f"{one['wall_s']:.0f}",
        )
    console.print(table)
    for name in (OURS, "naive"):
        if name in report["methods"]:
            shown = Table("bits per byte after", *report["domains"], GENERAL, title=name)
            one = report["methods"][name]
            for after, row, general in zip(
                ("nothing", *report["domains"]), one["matrix"], one["general"], strict=True
            ):
                shown.add_row(after, *(f"{value:.3f}" for value in row), f"{general:.3f}")
            console.print(shown)


def _names(settings: Settings) -> list[str]:
    from workloads.bench.learn_methods import methods

    known = [method.name for method in methods(settings.learn.replay)]
    for name in settings.methods:
        if name not in known:
            raise LearningError(f"there is no method {name!r}", f"there are: {', '.join(known)}")
    return [name for name in known if not settings.methods or name in settings.methods]


def _seeds(settings: Settings) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


_opened: dict[tuple[Any, ...], tuple[Any, dict[str, Domain]]] = {}


def _learnt(
    settings: Settings, name: str, seed: int, progress: Progress = lambda what, done: None
) -> tuple[Learnt, float]:
    """One method with one seed, and its seconds; a process keeps the model for the next."""
    from workloads.bench.learn_methods import learn_stream, methods

    method = next(one for one in methods(settings.learn.replay) if one.name == name)
    key = (settings.model, settings.device, settings.seed)
    if key not in _opened:
        _opened[key] = _open(settings, progress)
    model, domains = _opened[key]
    began = time.perf_counter()
    found = learn_stream(
        copy.deepcopy(model),
        [domain for domain in domains.values() if domain.name != GENERAL],
        domains[GENERAL],
        method,
        settings.learn,
        seed,
        lambda done: progress(f"{name}, seed {seed}", done),
    )
    seconds = time.perf_counter() - began
    _give_back_memory(settings.device)
    return found, seconds


def _give_back_memory(device: str) -> None:
    """Or it stays with this process, which may need less of it next time than another one."""
    import gc

    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _open(settings: Settings, progress: Progress) -> tuple[Any, dict[str, Domain]]:
    import torch

    from workloads.bench.learn_small import encode, small_model
    from workloads.bench.learn_text import divide

    if settings.device == "cpu":
        # Fewer where OMP_NUM_THREADS says so: two threads on a busy core wait for each other.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // settings.jobs)))
    of_text: Callable[[str], list[int]] = encode
    model: Any = None
    if settings.model is not None:
        from actors.trainable_version import open_encoder, open_version
        from cluster.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(settings.model)
        of_text = open_encoder(checkpoint)
        dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
        model = open_version(checkpoint, dtype=dtype, device=settings.device)
    domains = {
        name: divide(
            name,
            texts,
            of_text,
            window=settings.learn.length + 1,
            most_judged=settings.judged_tokens,
            most_learnt=settings.learnt_tokens,
        )
        for name, texts in settings.texts.items()
    }
    if model is None:
        model = small_model(
            domains[GENERAL],
            settings.small_steps,
            settings.seed,
            lambda done: progress("a small model", done),
        )
        model = model.to(settings.device)
    return model, domains


def _result(runs: Sequence[tuple[Learnt, float]]) -> dict[str, Any]:
    """Means over seeds, and each seed's own."""
    found: list[Scores] = [scores(one.matrix, one.general) for one, _ in runs]
    mean = {name: float(np.mean([getattr(one, name) for one in found])) for name in Scores.__slots__}
    learnt = [one for one, _ in runs]
    return {
        **mean,
        "gap_closed": None,
        "matrix": np.mean([one.matrix for one in learnt], axis=0).tolist(),
        "general": np.mean([one.general for one in learnt], axis=0).tolist(),
        "trained_share": max(one.trained_share for one in learnt),
        "trained_weights": float(np.mean([one.trained_weights for one in learnt])),
        "trained_bytes": 4 * float(np.mean([one.trained_weights for one in learnt])),
        "experts": [list(one.experts) for one in learnt],
        "clones": [list(one.clones) for one in learnt],
        "flops": float(np.mean([one.flops for one in learnt])),
        "wall_s": float(np.mean([seconds for _, seconds in runs])),
        "by_seed": [asdict(one) for one in found],
        "losses": [[round(loss, 4) for loss in one.losses] for one in learnt],
    }


def _add_gaps(results: dict[str, dict[str, Any]]) -> None:
    if "naive" not in results or "joint" not in results:
        return
    naive, joint = results["naive"]["average"], results["joint"]["average"]
    for one in results.values():
        one["gap_closed"] = gap_closed(one["average"], naive, joint)


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(0)
