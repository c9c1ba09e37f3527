"""`expertmesh bench canary`: does a trial find a bad version, and leave one alone that is as good?

1. a server of its own, and texts that its model wrote, as held-out text
2. a version with noise in two experts, on trial with a small share of requests: it must be rolled back by the test
3. a version that is as good (noise as small as rounding) on trial again and again: it must not be
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from scipy.stats import binom

from cluster.canary import Trial
from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.errors import HostError
from cluster.live_versions import HEADER
from workloads.bench.chaos_mesh import Mesh, started
from workloads.bench.chaos_run import Model
from workloads.bench.ports import free_port
from workloads.bench.report import Bar, envelope, now
from workloads.bench.swap import changed_experts, publish, stage

_SHARE: Final = 0.05
_STREAMS: Final = 16
_USERS: Final = 400
_TEXTS: Final = 80
_TEXT_TOKENS: Final = 48
_BEGINNINGS: Final = (
    "The river",
    "My sister",
    "In the city",
    "Once",
    "Water is",
    "The teacher said",
    "We found",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trial."""

    verdict: str
    """rolled back, promoted, or undecided."""
    reason: str
    seconds: float
    requests: int
    of_candidate: int
    failed: int
    strays: int
    """Users that were seen on both sides."""


def measure(
    config: Config,
    checkpoint: Checkpoint,
    model: Model,
    runs: int,
    seconds: float,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """The report; a neutral version is tried for so many seconds. An ExpertmeshError if the server can't start."""
    started_at = now()
    with tempfile.TemporaryDirectory(prefix="expertmesh-canary-") as name:
        folder = Path(name)
        store, holdout = folder / "versions", folder / "holdout.jsonl"
        given = {"store": str(store), "options": {}, "keep_warm": 3600.0, "holdout": str(holdout)}
        config = config.model_copy(
            update={
                "server": config.server.model_copy(update={"host": "127.0.0.1", "port": free_port()}),
                "versions": config.versions.model_copy(update=given),
            }
        )
        note("starting a server")
        with started(config, model.name, model.vocabulary) as mesh:
            note(f"{_TEXTS} texts to hold out")
            texts = asyncio.run(_texts(mesh, seed))
            holdout.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
            bad = _version(mesh, checkpoint, store, folder / "bad.safetensors", seed, 2, 1.0)
            note(f"a version with noise in two experts, on trial with {_SHARE:.0%} of requests")
            found = _tried(mesh, Trial(bad, (_SHARE,)), 600.0, seed)
            note(f"{found.verdict} after {found.seconds:.0f} s: {found.reason}")
            neutral = _version(mesh, checkpoint, store, folder / "neutral.safetensors", seed + 1, 1, 0.003)
            outcomes = []
            for run in range(runs):
                outcomes.append(_tried(mesh, Trial(neutral, (0.25,)), seconds, seed + 100 + run))
                note(
                    f"neutral {run}: {outcomes[-1].verdict} after {outcomes[-1].seconds:.0f} s, {outcomes[-1].reason}"
                )
            mesh.end()
    most = int(binom.ppf(0.995, found.requests, _SHARE))
    of_neutral = sum(outcome.of_candidate for outcome in outcomes)
    in_neutral = sum(outcome.requests for outcome in outcomes)
    low, high = (int(binom.ppf(q, in_neutral, 0.25)) for q in (0.005, 0.995))
    bars = [
        Bar("bad_rolled_back", float(found.verdict == "rolled back"), 1, False),
        Bar("bad_requests_over_expected", float(max(0, found.of_candidate - most)), 0, True),
        Bar("neutral_rolled_back", sum(o.verdict == "rolled back" for o in outcomes), 1, True),
        Bar("strayed_users", found.strays + sum(o.strays for o in outcomes), 0, True),
        Bar("failed_requests", found.failed + sum(o.failed for o in outcomes), 0, True),
        Bar("share_outside_99_percent", float(not low <= of_neutral <= high), 0, True),
    ]
    return envelope(
        "bench canary",
        seed=seed,
        started_at=started_at,
        series={"neutral_seconds": [o.seconds for o in outcomes]},
        bars=bars,
        model=model.name,
        bad=_plain(found) | {"most_requests_expected_99_percent": most},
        neutral=[_plain(outcome) for outcome in outcomes],
        neutral_share={"requests": in_neutral, "of_candidate": of_neutral, "low": low, "high": high},
    )


def _version(
    mesh: Mesh, checkpoint: Checkpoint, store: Path, file: Path, seed: int, experts: int, noise: float
) -> str:
    """A staged version with so much noise in so many experts."""
    changed_experts(checkpoint, file, seed, experts=experts, noise=noise)
    digest = str(publish(checkpoint, store, file)["digest"])
    stage(mesh, digest)
    return digest


def _tried(mesh: Mesh, trial: Trial, seconds: float, seed: int) -> Outcome:
    """A trial under load, for so many seconds at most; the version that served before serves again after it."""
    base = mesh.call("versions").serving
    mesh.call("try_out", trial)
    began, ended = time.monotonic(), False

    def going() -> bool:
        return not ended and time.monotonic() - began < seconds

    async def run() -> list[tuple[str, str, int]]:
        nonlocal ended
        asked = asyncio.create_task(_load(mesh, seed, going))
        while going():
            await asyncio.sleep(0.5)
            status = await asyncio.get_running_loop().run_in_executor(None, mesh.call, "versions")
            ended = status.candidate != trial.manifest
        return await asked

    answers = asyncio.run(run())
    took, status = time.monotonic() - began, mesh.call("versions")
    if status.candidate:
        verdict, reason = "undecided", status.verdict
        mesh.call("rollback", "bench", "")
    else:
        verdict = "promoted" if status.serving == trial.manifest else "rolled back"
        reason = status.verdict
        if verdict == "promoted":
            mesh.call("promote", base, "bench", "", None)
    # A request that came in before the trial had begun everywhere, or after it had ended, is the base's.
    sides: dict[str, set[str]] = {}
    for user, manifest, status_code in answers:
        if status_code == 200:
            sides.setdefault(user, set()).add(manifest)
    candidates = Counter(manifest for _, manifest, _ in answers)[trial.manifest]
    return Outcome(
        verdict,
        reason,
        took,
        len(answers),
        candidates,
        sum(code != 200 for _, _, code in answers),
        0 if verdict == "promoted" else sum(len(side) > 1 for side in sides.values()),
    )


async def _load(mesh: Mesh, seed: int, going: Callable[[], bool]) -> list[tuple[str, str, int]]:
    """Short requests of many users: user, manifest and status of each."""
    answers: list[tuple[str, str, int]] = []

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        # Users take turns, so that each is as frequent as any.
        users = itertools.cycle(range(number, _USERS, _STREAMS))
        while going():
            user = f"user-{seed}-{next(users)}"
            body = {
                "model": mesh.name,
                "prompt": [dice.randint(100, mesh.vocabulary - 1) for _ in range(8)],
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "user": user,
            }
            answer = await client.post(f"{mesh.url}/v1/completions", json=body)
            answers.append((user, answer.headers.get(HEADER, ""), answer.status_code))

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(stream(client, number) for number in range(_STREAMS)))
    return answers


async def _texts(mesh: Mesh, seed: int) -> list[str]:
    """What the model writes by itself: texts that it expects."""

    async def text(client: httpx.AsyncClient, number: int) -> str:
        body = {
            "model": mesh.name,
            "prompt": _BEGINNINGS[number % len(_BEGINNINGS)],
            "max_tokens": _TEXT_TOKENS,
            "temperature": 1.0,
            "seed": seed * 1000 + number,
            "ignore_eos": True,
        }
        answer = await client.post(f"{mesh.url}/v1/completions", json=body)
        if answer.status_code != 200:
            raise HostError(f"no text to hold out: {answer.text[:300]}")
        return str(body["prompt"]) + str(answer.json()["choices"][0]["text"])

    async with httpx.AsyncClient(timeout=600) as client:
        return list(await asyncio.gather(*(text(client, number) for number in range(_TEXTS))))


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in Outcome.__slots__}


def show(report: dict[str, Any], out: Console) -> None:
    """The verdicts and bars for a terminal."""
    bad = report["bad"]
    out.print(
        f"bad: {bad['verdict']} after {bad['seconds']:.0f} s and {bad['of_candidate']} of {bad['requests']} requests "
        f"({bad['reason']})",
        highlight=False,
    )
    out.print(f"neutral: {dict(Counter(run['verdict'] for run in report['neutral']))}", highlight=False)
    for key, bar in report["bars"].items():
        out.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
