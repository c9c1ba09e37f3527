"""`expertmesh bench learn-live`: from a text in the stream to a version that all requests get, under light load.

1. a server of its own with an empty store of versions, and a stream with text that its model knows
2. two users ask short things, one after the other, until the end
3. text of a domain is dropped into the stream by the command, and `learn serve --once` runs beside the server
4. what is held out of the domain is read by the API before and after
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from rich.console import Console

from cluster.config import Config
from cluster.errors import HostError, LearningError
from cluster.learning.judge import GateSettings, Judged, rises
from cluster.learning.split import holdout_of
from workloads.bench.chaos_mesh import Mesh, started
from workloads.bench.chaos_run import Model
from workloads.bench.ports import free_port
from workloads.bench.report import Bar, envelope, now

_KNOWN: Final = "general"
_HOLDOUT: Final = 0.2
# Of each domain that are dropped, and held-out texts that are read by the API.
_TEXTS: Final = 200
_READ: Final = 24
_CHARACTERS: Final = 800
_USERS: Final = 2
_THINKS_S: Final = 0.5
_ROUND_S: Final = 3600.0
_LONGEST_S: Final = 15 * 60.0


@dataclass
class Asked:
    """What came of the users' requests."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def measure(
    config: Config,
    model: Model,
    texts: Mapping[str, Sequence[str]],
    seed: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """The report. `texts`: of the domain that is to be learnt, and of `general`, which is known.

    LearningError for too few texts; an ExpertmeshError if the server can't start, or the loop ends with an error.
    """
    domain = next(name for name in texts if name != _KNOWN)
    chosen = {name: _some(name, of_domain) for name, of_domain in texts.items()}
    held = [text for text in chosen[domain] if _held_out(text)][:_READ]
    started_at = now()
    with tempfile.TemporaryDirectory(prefix="expertmesh-learn-live-") as name:
        folder = Path(name)
        config = _configured(config, folder)
        file = folder / "mesh.yaml"
        # With what is null: to look for drift never is said that way.
        tree = config.model_dump(mode="json")
        tree["server"].pop("api_keys")
        file.write_text(yaml.safe_dump(tree), "utf-8")
        note("starting a server")
        with started(config, model.name, model.vocabulary) as mesh:
            _ingest(folder, file, _KNOWN, chosen[_KNOWN])
            note(f"reading {len(held)} held-out texts of {domain}")
            before = [_bits(mesh, text) for text in held]
            with users(mesh, seed) as asked:
                note(f"{len(chosen[domain])} texts of {domain} are dropped into the stream")
                began = time.monotonic()
                _ingest(folder, file, domain, chosen[domain])
                _command("serve", "--once", "--url", mesh.url, "--config", str(file), timeout_s=_ROUND_S)
                took = time.monotonic() - began
            status = json.loads(_command("status", "--json", "--config", str(file)))
            serving = mesh.call("versions").serving
            after = [_bits(mesh, text) for text in held]
            mesh.end()
    (one,) = status["rounds"]
    read = [Judged(len(t.encode()), b, a) for t, b, a in zip(held, before, after, strict=True)]
    rise = rises(read, GateSettings())
    size = sum(text.size for text in read)
    bars = [
        Bar("live_s", took if one["phase"] == "promoted" else None, _LONGEST_S, True),
        Bar("promoted", float(one["phase"] == "promoted" and serving == one["manifest"]), 1, False),
        Bar("failed_requests", len(asked.failed), 0, True),
        # Of its mean: better for sure, by the API.
        Bar("bits_per_byte_rise_high", rise.high, 0, True),
    ]
    return envelope(
        "bench learn-live",
        seed=seed,
        started_at=started_at,
        series={"request_s": asked.seconds} if asked.seconds else {},
        bars=bars,
        model=model.name,
        domain=domain,
        requests=len(asked.seconds),
        failures=asked.failed[:5],
        took_s=took,
        bits_per_byte_before=sum(before) / size,
        bits_per_byte_after=sum(after) / size,
        rise=rise.mean,
        round=one,
        settings=config.learning.model_dump(mode="json", exclude_none=True),
    )


def _configured(config: Config, folder: Path) -> Config:
    """With places of its own, and a version that is soon tried out on half of all users."""
    learning = config.learning
    places = {
        "stream": str(folder / "stream"),
        "state": str(folder / "state"),
        "known": (_KNOWN,),
        "holdout": _HOLDOUT,
        "canary": (0.5,),
        "canary_every": 5.0,
    }
    return config.model_copy(
        update={
            "server": config.server.model_copy(update={"host": "127.0.0.1", "port": free_port()}),
            "versions": config.versions.model_copy(
                update={"store": str(folder / "versions"), "options": {}, "keep_warm": 3600.0}
            ),
            "learning": learning.model_copy(update=places),
        }
    )


def _some(name: str, texts: Sequence[str]) -> list[str]:
    """Texts by lot, the same each time. LearningError if too few of them are held out."""
    found = random.Random(name).sample(list(texts), min(_TEXTS, len(texts)))
    found = [text[:_CHARACTERS] for text in found]
    fewest = GateSettings().fewest_texts
    if (held := sum(map(_held_out, found))) < fewest:
        raise LearningError(
            f"{len(found)} texts of {name} are too few: {held} are held out, {fewest} are needed",
            "give a folder with more text",
        )
    return found


def _held_out(text: str) -> bool:
    return holdout_of(text, _HOLDOUT, 1) is not None


def _ingest(folder: Path, config: Path, domain: str, texts: Sequence[str]) -> None:
    file = folder / f"{domain}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    _command("ingest", str(file), "--domain", domain, "--config", str(config))


def _command(*words: str, timeout_s: float = 300.0) -> str:
    """A command on learning, as an operator would give it; what it prints. HostError if it ends with an error."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EXPERTMESH__")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from workloads.cli import main; main()", "learn", *words],
            capture_output=True,
            text=True,
            check=False,
            env=inherited,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"`learn {words[0]}` did not end within {timeout_s:g} s") from error
    if done.returncode:
        raise HostError(f"`learn {words[0]}` ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _bits(mesh: Mesh, text: str) -> float:
    """Bits that the served model takes for a text after its first token, as the API tells it."""
    body = {
        "model": mesh.name,
        "prompt": text,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=300)
    if answer.status_code != 200:
        raise HostError(f"a text could not be read by the API: {answer.text[:300]}")
    # The text's own token comes first, whatever its rank.
    nats = [
        next(iter(token.values()))["logprob"]
        for token in answer.json()["choices"][0]["prompt_logprobs"]
        if token
    ]
    return -sum(nats) / math.log(2)


@contextlib.contextmanager
def users(mesh: Mesh, seed: int) -> Iterator[Asked]:
    """Within the block two users at a time ask; each request is a new user's, since a trial has its users by a hash."""
    asked, over = Asked(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_asking(mesh, seed, asked, over)))
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        thread.join()


async def _asking(mesh: Mesh, seed: int, asked: Asked, over: threading.Event) -> None:
    async def user(client: httpx.AsyncClient, number: int) -> None:
        dice, turn = random.Random(f"{seed} {number}"), 0
        while not over.is_set():
            turn += 1
            body = {
                "model": mesh.name,
                "prompt": [dice.randint(100, mesh.vocabulary - 1) for _ in range(8)],
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "user": f"user-{seed}-{number}-{turn}",
            }
            began = time.monotonic()
            try:
                answer = await client.post(f"{mesh.url}/v1/completions", json=body)
                if answer.status_code == 200:
                    asked.seconds.append(time.monotonic() - began)
                else:
                    asked.failed.append(f"{answer.status_code} {answer.text[:200]}")
            except httpx.HTTPError as error:
                asked.failed.append(str(error) or type(error).__name__)
            await asyncio.sleep(_THINKS_S)

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(user(client, number) for number in range(_USERS)))


def show(report: dict[str, Any], out: Console) -> None:
    """The figures and bars for a terminal."""
    one = report["round"]
    out.print(
        f"{report['domain']}: {one['phase']} after {report['took_s']:.0f} s, {one['samples']} samples, "
        f"{one['steps']} steps, {one['trained_share']:.1%} of weights; "
        f"{report['bits_per_byte_before']:.4f} to {report['bits_per_byte_after']:.4f} bits per byte by the API; "
        f"{report['requests']} requests meanwhile",
        highlight=False,
    )
    for reason in one["reasons"]:
        out.print(f"  {reason}", highlight=False)
    for key, bar in report["bars"].items():
        out.print(Bar(key, bar["value"], bar["limit"], bar["at_most"]).line(), highlight=False)
