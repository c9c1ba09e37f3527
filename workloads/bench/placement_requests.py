"""Real requests replayed over a placement: what batches come together, and how long steps and answers take.

An engine is simulated: first come, first served, decode before prefill, prompts in chunks, prefixes that were seen
before are not computed again. Its tokens are routed as those of a routing trace, one after the other. Time is that of
the simulation: a step takes what its slowest hosts take, and what the engine takes beside them.
"""

from __future__ import annotations

import gzip
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from cluster.errors import ConfigError
from workloads.bench.placement_replay import Levels
from workloads.bench.placement_trace import Trace

BLOCK = 512
"""Tokens of a prefix block."""


class Request(BaseModel):
    """One request of a trace."""

    timestamp: float = Field(ge=0)
    """Milliseconds since the trace's beginning."""
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=0)
    hash_ids: tuple[int, ...] = ()
    """Names of the prompt's prefix blocks: equal ones stand for equal prefixes."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What is simulated beside the hosts."""

    max_tokens: int = 2048
    """Of a step."""
    max_running: int = 256
    seconds: float = 5e-3
    """What a step takes beside its experts."""


@dataclass(frozen=True)
class Replayed:
    """What became of the requests under one placement; times are seconds."""

    requests: int
    steps: int
    tokens: int
    """Computed: prompts but for known prefixes, and answers."""
    seconds: float
    """From the first arrival to the last answer."""
    experts_s: np.ndarray
    """float64 [steps]: the slowest hosts of all layers."""
    balance: float
    """Mean over longest of the hosts' busy time, all steps together: 1 is even."""
    busy: float
    """Share of the time that the mean host computes."""
    first_token_s: np.ndarray
    """float64 [requests]."""
    per_token_s: np.ndarray
    """float64 [requests with two tokens or more]."""


@dataclass(slots=True)
class _Running:
    """A request in the engine."""

    arrival: float
    prompt: int
    """Tokens that are still to be computed before the first answer."""
    answer: int
    """Tokens that are still to come."""
    length: int
    first: float = 0.0


def read_requests(file: Path, number: int | None = None) -> list[Request]:
    """The first requests of a JSON-lines file, gzipped or not; ConfigError if it can't be read or makes no sense."""
    way_out = "a line is {timestamp (ms), input_length, output_length, hash_ids}"
    found: list[Request] = []
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            for line in islice(lines, number):
                found.append(Request.model_validate_json(line))
    except (OSError, EOFError) as error:
        raise ConfigError(f"--requests {file} can't be read: {error}", way_out) from error
    except (ValidationError, ValueError) as error:
        raise ConfigError(
            f"--requests {file}, line {len(found) + 1}: {str(error).splitlines()[0]}", way_out
        ) from error
    if not found:
        raise ConfigError(f"--requests {file} has no request", way_out)
    return sorted(found, key=lambda request: request.timestamp)


def replay(trace: Trace, requests: Sequence[Request], hosts: int, levels: Levels, engine: Engine) -> Replayed:
    """Answer every request, and tell how long it took."""
    coming = deque(_arrivals(requests))
    tokens = _Tokens(trace)
    waiting: deque[_Running] = deque()
    running: list[_Running] = []
    now = first_arrival = coming[0].arrival
    experts_s: list[float] = []
    firsts: list[float] = []
    per_token: list[float] = []
    computed = 0
    busy = np.zeros(hosts)
    while coming or waiting or running:
        while coming and coming[0].arrival <= now:
            waiting.append(coming.popleft())
        if not waiting and not running:
            now = coming[0].arrival
            continue
        chunks = _chunks(running, waiting, engine)
        step = sum(chunk for _, chunk in chunks)
        computed += step
        longest = 0.0
        for layer, rows in enumerate(tokens.take(step)):
            seconds = levels(layer, rows)
            longest += float(seconds.max())
            busy += seconds
        experts_s.append(longest)
        now += engine.seconds + longest
        for request, chunk in chunks:
            _advance(request, chunk, now, firsts, per_token)
        running = [request for request in running if request.prompt or request.answer]
    taken = max(now - first_arrival, 1e-12)
    return Replayed(
        len(firsts),
        len(experts_s),
        computed,
        now - first_arrival,
        np.array(experts_s),
        float(busy.mean() / busy.max()) if busy.max() > 0 else 1.0,
        float(busy.mean() / taken),
        np.array(firsts),
        np.array(per_token),
    )


def _arrivals(requests: Sequence[Request]) -> Iterator[_Running]:
    seen: set[int] = set()
    for request in requests:
        known = len(list(takewhile(seen.__contains__, request.hash_ids))) * BLOCK
        seen.update(request.hash_ids)
        # The last token of a prompt is computed in any case: the first answer comes of it.
        prompt = max(1, request.input_length - known)
        answer = max(1, request.output_length)
        yield _Running(request.timestamp / 1e3, prompt, answer, answer)


def _chunks(running: list[_Running], waiting: deque[_Running], engine: Engine) -> list[tuple[_Running, int]]:
    """Which request computes how many tokens in this step; requests that begin are moved to `running`."""
    left = engine.max_tokens
    chunks = []
    for request in sorted(running, key=lambda request: request.prompt > 0):
        chunk = min(left, request.prompt or 1)
        if chunk:
            chunks.append((request, chunk))
            left -= chunk
    while left and waiting and len(running) < engine.max_running:
        request = waiting.popleft()
        running.append(request)
        chunk = min(left, request.prompt)
        chunks.append((request, chunk))
        left -= chunk
    return chunks


def _advance(request: _Running, chunk: int, now: float, firsts: list[float], per_token: list[float]) -> None:
    if request.prompt:
        request.prompt -= chunk
        if request.prompt:
            return
        request.first = now
        firsts.append(now - request.arrival)
    request.answer -= 1
    if not request.answer and request.length > 1:
        per_token.append((now - request.first) / (request.length - 1))


class _Tokens:
    """The trace's tokens in their order, over and over."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._at = trace, 0

    def take(self, number: int) -> np.ndarray:
        """float64 [L, E]: rows of the next so many tokens."""
        total = np.zeros((self._trace.layers, self._trace.num_experts))
        while number:
            end = min(self._at + number, self._trace.tokens)
            total += self._trace.counts(self._at, end)
            number -= end - self._at
            self._at = end % self._trace.tokens
        return total


def summary(found: Replayed) -> dict[str, float]:
    """In numbers for a report."""

    def quantiles(name: str, values: np.ndarray) -> dict[str, float]:
        if not len(values):
            return {}
        p50, p99 = np.quantile(values, (0.5, 0.99)).tolist()
        return {f"{name}_p50": p50, f"{name}_p99": p99}

    return {
        "requests": found.requests,
        "steps": found.steps,
        "tokens": found.tokens,
        "tokens_per_s": found.tokens / max(found.seconds, 1e-12),
        "balance": found.balance,
        "busy": found.busy,
        **quantiles("experts_s", found.experts_s),
        **quantiles("first_token_s", found.first_token_s),
        **quantiles("per_token_s", found.per_token_s),
    }
