"""A mesh learns while it serves: from texts that are dropped into the stream to a version that all requests get."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.learning.sources import records_of_file
from cluster.learning.split import holdout_of
from tests.e2e.programs import Program, run, wait_for
from tests.e2e.version_mesh import Mesh, running_mesh

pytestmark = pytest.mark.slow

WORDS = {
    "law": ("the", "winter", "court", "heard", "long", "case", "and", "ruled", "for", "winter"),
    "code": ("river", "boat", "left", "early", "froze", "that", "day", "before", "river"),
}
HOLDOUT = 0.2
LEARNING = {
    "holdout": HOLDOUT,
    "known": ["code"],
    "least": 40,
    "pause_above": 50,
    "canary": [0.5],
    "canary_every": "1s",
    "drift": {"every": "1s", "texts": 40, "warm": 8},
    "training": {
        "steps": 40,
        "length": 32,
        "reach": 0.6,
        "rate": 0.01,
        "keep_every": 5,
        # The tests that run beside it would never let it have a core.
        "gentle": False,
    },
}
ROUND_S = 900.0
"""What the whole way may take on two cores."""


@pytest.fixture(scope="module")
def mesh(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("learning")
    places = {"stream": str(folder / "stream"), "state": str(folder / "state")}
    with running_mesh(tiny_model, folder, learning={**LEARNING, **places}) as mesh:
        yield mesh


def learn(mesh: Mesh, folder: Path, *words: str, code: int = 0) -> Program:
    done = run(folder, "learn", *words, "--config", str(mesh.server.config), timeout_s=ROUND_S)
    assert done.process.returncode == code, done.out + done.err
    return done


def status(mesh: Mesh, folder: Path) -> Any:
    return json.loads(learn(mesh, folder, "status", "--json").out)


def dropped(mesh: Mesh, folder: Path, domain: str, texts: list[str]) -> Path:
    """Texts in the stream, from a file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{domain}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    learn(mesh, folder / "ingest", "ingest", str(file), "--domain", domain)
    return file


def of_words(domain: str, count: int) -> list[str]:
    dice = random.Random(domain)
    return [f"{' '.join(dice.choices(WORDS[domain], k=24))} {number}" for number in range(count)]


def bits_per_byte(mesh: Mesh, file: Path) -> float:
    """Of the texts of a file that are held out, as the API tells it."""
    texts = [record.text for record in records_of_file(file, "", "", 0.0)]
    held = [text for text in texts if holdout_of(text, HOLDOUT, 1) is not None]
    assert len(held) >= 8
    bits = 0.0
    for text in held:
        answer: Any = mesh.client.completions.create(
            model="tiny", prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        for token in answer.choices[0].prompt_logprobs:
            if token is not None:
                bits -= next(iter(token.values()))["logprob"] / math.log(2)
    return bits / sum(len(text.encode()) for text in held)


class Users:
    """Two users at a time who ask one short thing after the other, and what came of it; every one is a new one.

    A version on trial has its users, by a hash of each.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.answers = 0
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(name,)) for name in ("ann", "bob")]

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, name: str) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                self._mesh.client.completions.create(
                    model="tiny", prompt=[7, 11, 3], max_tokens=4, temperature=0, user=f"{name} {number}"
                )
                self.answers += 1
            except openai.OpenAIError as error:
                self.failed.append(str(error))
            self._stop.wait(0.05)


def test_text_in_the_stream_is_soon_a_version_that_serves(mesh: Mesh, tmp_path: Path) -> None:
    base = mesh.answer()[0]
    dropped(mesh, tmp_path / "code", "code", of_words("code", 120))
    law = dropped(mesh, tmp_path / "law", "law", of_words("law", 120))
    before = bits_per_byte(mesh, law)
    began = time.monotonic()
    with Users(mesh) as users:
        done = learn(mesh, tmp_path / "serve", "serve", "--once", "--url", mesh.server.url)
    took = time.monotonic() - began
    assert users.failed == [] and users.answers > 100
    found = status(mesh, tmp_path / "status")
    (one,) = found["rounds"]
    assert one["phase"] == "promoted" and one["domain"] == "law", done.out + done.err
    assert one["parent"] == base and mesh.answer()[0] == one["manifest"] == mesh.status().serving
    assert mesh.command("list")["aliases"]["production"] == one["manifest"]
    assert found["replayed"]["law"] == one["samples"] > 0 and found["waiting"] == {}
    tracks = found["drift"]["domains"]
    assert found["drift"]["trouble"] == "" and tracks.keys() == {"law", "code"}
    first = tracks["law"]["points"][0]
    assert first["manifest"] == base and first["holdout"] == pytest.approx(before, rel=0.1)
    after = bits_per_byte(mesh, law)
    print(f"live after {took:.0f} s, {users.answers} answers; {before:.4f} to {after:.4f} bits per byte")
    assert after < 0.8 * before and took < ROUND_S
    assert after / before == pytest.approx(
        one["metrics"]["bits_per_byte.law.after"] / one["metrics"]["bits_per_byte.law.before"], rel=0.05
    )


@pytest.mark.long
def test_a_poisoned_batch_is_stopped_and_says_why(mesh: Mesh, tmp_path: Path) -> None:
    serving, rounds = mesh.answer()[0], len(status(mesh, tmp_path / "before")["rounds"])
    dice = random.Random(5)
    noise = ["".join(chr(dice.randrange(33, 126)) for _ in range(100)) for _ in range(120)]
    dropped(mesh, tmp_path / "noise", "law", noise)
    learn(mesh, tmp_path / "serve", "serve", "--once", "--url", mesh.server.url)
    dropped(mesh, tmp_path / "spam", "law", [f"{'buy now ' * 30}{number}" for number in range(120)])
    learn(mesh, tmp_path / "again", "serve", "--once", "--url", mesh.server.url)
    found = status(mesh, tmp_path / "after")
    noisy, spam = found["rounds"][rounds:]
    assert noisy["phase"] == spam["phase"] == "refused" and noisy["manifest"] == spam["manifest"] == ""
    assert any("law" in reason for reason in noisy["reasons"]), noisy
    assert "repeats itself" in spam["reasons"][0]
    assert mesh.answer()[0] == serving and mesh.status().candidate == ""
    shown = learn(mesh, tmp_path / "shown", "status").out
    assert "refused" in shown and "repeats itself" in " ".join(shown.split())


@pytest.mark.long
def test_a_loop_that_is_interrupted_or_killed_goes_on_with_its_round(mesh: Mesh, tmp_path: Path) -> None:
    rounds = len(status(mesh, tmp_path / "before")["rounds"])
    dropped(mesh, tmp_path / "law", "law", [f"{text} again" for text in of_words("law", 160)])
    words = ["learn", "serve", "--once", "--url", mesh.server.url, "--config", str(mesh.server.config)]
    jobs = Path(mesh.store).parent / "state" / "jobs"
    loop = Program(tmp_path / "first", words)
    try:
        wait_for(lambda: list(jobs.glob("*/job")), 120, "the round to be put down")
        (name,) = (job.parent.name for job in jobs.glob("*/job"))
        loop.interrupt()
        assert loop.wait() == 130 and "Traceback" not in loop.err, loop.err
        loop.assert_gone()
    finally:
        loop.kill()
    assert status(mesh, tmp_path / "between")["round"]["phase"] == "training"
    loop = Program(tmp_path / "second", words)
    try:
        wait_for(lambda: (jobs / name / "progress").exists(), 300, "the training to begin")
        os.kill(loop.process.pid, signal.SIGKILL)
        loop.wait()
    finally:
        loop.kill()
    # Where the gate lets it through, it is tried out on somebody.
    with Users(mesh):
        learn(mesh, tmp_path / "third", "serve", "--once", "--url", mesh.server.url)
    found = status(mesh, tmp_path / "after")
    (one,) = found["rounds"][rounds:]
    assert (
        one["steps"] == 40 and one["phase"] in ("refused", "promoted") and f"round-{one['number']:06}" == name
    )
    assert found["round"] is None and found["waiting"] == {} and not list(jobs.glob("*"))


@pytest.mark.long
def test_an_alarm_says_that_people_ask_for_something_else(mesh: Mesh, tmp_path: Path) -> None:
    dice = random.Random(6)
    noise = ["".join(chr(dice.randrange(33, 126)) for _ in range(100)) for _ in range(60)]
    calm = [f"{text} as ever" for text in of_words("code", 40)]
    for number, texts in enumerate((calm, noise)):
        dropped(mesh, tmp_path / str(number), "code", texts)
        learn(mesh, tmp_path / f"serve-{number}", "serve", "--until-idle", "--url", mesh.server.url)
    track = status(mesh, tmp_path / "after")["drift"]["domains"]["code"]
    live = [point["live"] for point in track["points"] if point["live"] is not None]
    print(live, track["live_reference"], track["evidence"])
    assert track["alarm"]["what"] == "live" and track["alarm"]["manifest"] == mesh.answer()[0], track
    assert live[-1] > 1.1 * track["live_reference"]
    assert "ALARM code gets worse" in " ".join(learn(mesh, tmp_path / "shown", "status").out.split())
