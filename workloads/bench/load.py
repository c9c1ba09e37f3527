"""The load of `bench serve` and `bench replicas`: servers that run at once, asked in turn over HTTP.

In turn, so that a machine whose speed drifts slows all alike; a server that is not asked takes no core.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.table import Table

from cluster.errors import ExpertmeshError
from workloads.bench.report import quantiles

_TIMEOUT_S = 600.0
_PROMPT_TOKENS = 32
_SINGLE, _MANY = 1, 16
"""Concurrencies: time between tokens is compared at the first, throughput at the second."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one block sends: `concurrency` prompts at once of random tokens."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int


@dataclass
class Series:
    """What one server did at one concurrency: tokens per second per block, milliseconds between tokens."""

    tokens_per_s: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)

    def add(self, load: Load, seconds: float, times: Sequence[Sequence[float]]) -> None:
        """Take in a block: its seconds, and per request when it was sent and each of its tokens came."""
        self.tokens_per_s.append(load.concurrency * load.output_tokens / seconds)
        for request in times:
            self.ttft_ms.append((request[1] - request[0]) * 1e3)
            self.itl_ms.extend((b - a) * 1e3 for a, b in itertools.pairwise(request[1:]))


AllSeries = Mapping[tuple[str, int], Series]
"""By server and concurrency."""


def ask_in_turn(
    urls: Mapping[str, str],
    name: str,
    vocabulary: int,
    *,
    rounds: int,
    seed: int,
    output_tokens: int,
    on_round: Callable[[int], None],
) -> dict[tuple[str, int], Series]:
    """Ask every server the same prompts, `rounds` times at each concurrency, after one round that warms up.

    `on_round` is told how many rounds are over, the warming one included. ExpertmeshError if an answer fails.
    """
    loads = [Load(concurrency, _PROMPT_TOKENS, output_tokens) for concurrency in (_SINGLE, _MANY)]
    series = {(who, load.concurrency): Series() for who in urls for load in loads}
    generator = random.Random(seed)
    for number in range(-1, rounds):
        for load in loads:
            sent = prompts(generator, load, vocabulary)
            for who in order(tuple(urls), number):
                seconds, times = asyncio.run(block(urls[who], name, sent, load))
                if number >= 0:
                    series[who, load.concurrency].add(load, seconds, times)
        on_round(number + 2)
    return series


def order(names: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Who is asked first in a round: one and the other, so that none always runs on the warmer machine."""
    return names if number % 2 else names[::-1]


def prompts(generator: random.Random, load: Load, vocabulary: int) -> list[list[int]]:
    """One block's prompts, as token ids below `vocabulary`."""
    low, high = min(100, vocabulary // 2), vocabulary - 1
    return [
        [generator.randint(low, high) for _ in range(load.prompt_tokens)] for _ in range(load.concurrency)
    ]


async def block(
    url: str, name: str, prompts: Sequence[Sequence[int]], load: Load
) -> tuple[float, list[list[float]]]:
    """One turn: all prompts at once. Returns its seconds, and per request when it was sent and its tokens came.

    ExpertmeshError if an answer fails: a failed one would pass for a fast one.
    """

    async def request(client: httpx.AsyncClient, prompt: Sequence[int]) -> list[float]:
        body = {
            "model": name,
            "prompt": prompt,
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        times = [time.perf_counter()]
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise ExpertmeshError(f"{url} answered {response.status_code}: {text[:300]}")
            async for line in response.aiter_lines():
                if line.startswith('data: {"error"'):
                    raise ExpertmeshError(f"{url} broke an answer off: {line[:300]}")
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        if len(times) == 1:
            raise ExpertmeshError(f"{url} answered without a token")
        return times

    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            begin = time.perf_counter()
            times = await asyncio.gather(*(request(client, prompt) for prompt in prompts))
            return time.perf_counter() - begin, list(times)
    except httpx.HTTPError as error:
        raise ExpertmeshError(f"{url} did not answer: {error or type(error).__name__}") from error


def throughput_ratio(series: AllSeries, ours: str, theirs: str) -> float:
    """Median of the rounds' ratios of tokens per second: turns beside each other saw the same machine."""
    pairs = zip(series[ours, _MANY].tokens_per_s, series[theirs, _MANY].tokens_per_s, strict=True)
    return quantiles([mine / other for mine, other in pairs]).p50


def itl_ratio(series: AllSeries, ours: str, theirs: str) -> float:
    """Ratio of the median times between tokens of a single stream."""
    return quantiles(series[ours, _SINGLE].itl_ms).p50 / quantiles(series[theirs, _SINGLE].itl_ms).p50


def rows(series: AllSeries) -> list[dict[str, Any]]:
    """One row per server and concurrency, for the report."""
    found = []
    for (who, concurrency), one in series.items():
        itl_ms = quantiles(one.itl_ms)
        found.append(
            {
                "server": who,
                "concurrency": concurrency,
                "tokens_per_s_p50": quantiles(one.tokens_per_s).p50,
                "itl_ms_p50": itl_ms.p50,
                "itl_ms_p99": itl_ms.p99,
                "ttft_ms_p50": quantiles(one.ttft_ms).p50,
            }
        )
    return found


def table(found: Iterable[Mapping[str, Any]]) -> Table:
    """The same rows for people."""
    shown = Table(
        "server", "concurrency", "tokens/s p50", "between tokens ms p50", "p99", "first token ms p50"
    )
    for row in found:
        shown.add_row(
            row["server"],
            str(row["concurrency"]),
            f"{row['tokens_per_s_p50']:.1f}",
            f"{row['itl_ms_p50']:.1f}",
            f"{row['itl_ms_p99']:.1f}",
            f"{row['ttft_ms_p50']:.0f}",
        )
    return shown


def named(series: AllSeries) -> dict[str, list[float]]:
    """The series under the names that they have in the report."""
    return {
        f"{who}_{concurrency}_{key}": getattr(one, key)
        for (who, concurrency), one in series.items()
        for key in ("tokens_per_s", "itl_ms", "ttft_ms")
    }
