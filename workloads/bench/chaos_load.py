"""The load of a chaos run: streams of completions over HTTP, each token with the time it came.

What went wrong with an answer is kept, never raised: a run is about answers that fail.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from cluster.live_versions import HEADER
from workloads.bench.chaos_scenario import Load

# refused: a 503, as status or as an event. short: [DONE] came too early. broken: the connection ended first.
Outcome = Literal["ok", "refused", "unreachable", "status", "event", "broken", "no-done", "short", "timeout"]

# Between two tries of a server that is away, so that a stream does not count hundreds of them.
_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True)
class Prompt:
    """Which of the load's prompts, its token ids, and how many tokens are wanted in answer."""

    stream: int
    number: int
    tokens: tuple[int, ...]
    wanted: int

    @property
    def key(self) -> tuple[int, int]:
        """Names the prompt within its load."""
        return self.stream, self.number


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's outcome; times in nanoseconds of CLOCK_MONOTONIC."""

    key: tuple[int, int]
    sent_ns: int
    ended_ns: int
    outcome: Outcome
    reason: str
    tokens: tuple[int, ...]
    times_ns: tuple[int, ...]
    """One per event that brought tokens."""
    counts: tuple[int, ...]
    """How many tokens each of these events brought."""
    manifest: str = ""
    """The version of the model that it says it is of."""


@dataclass
class _Heard:
    """What came of one answer so far."""

    tokens: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    done: bool = False
    manifest: str = ""
    error: Mapping[str, Any] | None = None


def prompts(load: Load, vocabulary: int) -> tuple[tuple[Prompt, ...], ...]:
    """Per stream its prompts: random ids below `vocabulary`, the same for the same seed.

    Answers are between half of `load.output_tokens` and all of it long. Were they of one length, all streams
    would begin and end as one, and a fault between two answers would stall no stream that is under way.
    """
    dice = random.Random(load.seed)
    low, high = min(100, vocabulary // 2), vocabulary - 1

    def prompt(stream: int, number: int) -> Prompt:
        tokens = tuple(dice.randint(low, high) for _ in range(load.prompt_tokens))
        return Prompt(stream, number, tokens, dice.randint((load.output_tokens + 1) // 2, load.output_tokens))

    return tuple(
        tuple(prompt(stream, number) for number in range(load.prompts)) for stream in range(load.streams)
    )


async def once(
    url: str, model: str, load: Load, streams: tuple[tuple[Prompt, ...], ...], passes: int = 1
) -> list[Answer]:
    """Every stream sends all its prompts `passes` times, all streams at once."""
    return await streamed(url, model, load, streams, lambda sent, _: sent < passes * load.prompts)


async def under_faults(
    url: str,
    model: str,
    load: Load,
    streams: tuple[tuple[Prompt, ...], ...],
    faults: Callable[[], Awaitable[None]],
) -> list[Answer]:
    """The same until `load.duration` seconds are over, while `faults` runs beside; waits for both."""

    def go_on(sent: int, seconds: float) -> bool:
        return seconds < load.duration if load.repeat else sent < load.prompts

    asked = asyncio.create_task(streamed(url, model, load, streams, go_on))
    try:
        await faults()
        return await asked
    finally:
        asked.cancel()


async def streamed(
    url: str,
    model: str,
    load: Load,
    streams: tuple[tuple[Prompt, ...], ...],
    go_on: Callable[[int, float], bool],
) -> list[Answer]:
    """Every stream sends one prompt after the other while `go_on` says so, of how many it sent and of seconds."""
    answers: list[Answer] = []
    begin = time.monotonic()

    async def stream(client: httpx.AsyncClient, mine: tuple[Prompt, ...]) -> None:
        sent = 0
        while go_on(sent, time.monotonic() - begin):
            answer = await ask(client, url, model, mine[sent % len(mine)], load)
            answers.append(answer)
            sent += 1
            if not answer.tokens and answer.outcome != "ok":
                await asyncio.sleep(_PAUSE_S)

    # A connection for each request: one that was kept may be to a server that is gone, which is no fault of
    # the mesh.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=load.request_timeout, limits=limits) as client:
        await asyncio.gather(*(stream(client, mine) for mine in streams))
    return answers


async def ask(client: httpx.AsyncClient, url: str, model: str, prompt: Prompt, load: Load) -> Answer:
    """One streamed, greedy completion of exactly `prompt.wanted` tokens."""
    body = {
        "model": model,
        "prompt": list(prompt.tokens),
        "max_tokens": prompt.wanted,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    heard = _Heard()
    sent_ns = time.monotonic_ns()
    try:
        async with asyncio.timeout(load.request_timeout):
            request = client.stream("POST", f"{url}/v1/completions", json=body)
            outcome, reason = await _listen(request, heard, prompt.wanted)
    except TimeoutError:
        outcome, reason = "timeout", f"no end within {load.request_timeout:g} s"
    except ValueError as error:
        outcome, reason = "event", f"not JSON: {error}"
    except httpx.ConnectError as error:
        outcome, reason = "unreachable", str(error)
    except httpx.HTTPError as error:
        outcome, reason = "broken", str(error) or type(error).__name__
    return Answer(
        prompt.key,
        sent_ns,
        time.monotonic_ns(),
        outcome,
        reason,
        tuple(heard.tokens),
        tuple(heard.times_ns),
        tuple(heard.counts),
        heard.manifest,
    )


async def _listen(
    request: AbstractAsyncContextManager[httpx.Response], heard: _Heard, wanted: int
) -> tuple[Outcome, str]:
    async with request as response:
        heard.manifest = response.headers.get(HEADER, "")
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            return ("refused" if response.status_code == 503 else "status"), f"{response.status_code} {text}"
        rest = b""
        # Not by httpx's lines, which end at every character that Unicode takes for a line's end: tokens may be one.
        async for data in response.aiter_bytes():
            now_ns = time.monotonic_ns()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                hear(line.rstrip(b"\r"), now_ns, heard)
    return judge(heard, wanted)


def hear(line: bytes, now_ns: int, heard: _Heard) -> None:
    """Take one line of a stream of events; ValueError if it is an event that is no JSON."""
    if line == b"data: [DONE]":
        heard.done = True
        return
    if not line.startswith(b"data: {"):
        return
    event = json.loads(line[len(b"data: ") :])
    if "error" in event:
        error = event["error"]
        heard.error = error if isinstance(error, dict) else {"message": str(error)}
        return
    tokens = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
    if tokens:
        heard.tokens.extend(tokens)
        heard.times_ns.append(now_ns)
        heard.counts.append(len(tokens))


def judge(heard: _Heard, wanted: int) -> tuple[Outcome, str]:
    """The outcome of a stream whose connection ended in good order."""
    if heard.error is not None:
        refused = str(heard.error.get("code")) == "503"
        return ("refused" if refused else "event"), str(heard.error.get("message", heard.error))
    if not heard.done:
        return "no-done", f"the stream ended after {len(heard.tokens)} tokens without [DONE]"
    if len(heard.tokens) != wanted:
        return "short", f"[DONE] after {len(heard.tokens)} of {wanted} tokens"
    return "ok", ""
