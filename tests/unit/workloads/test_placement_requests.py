"""Requests replayed over a placement: all are answered, nothing is computed twice, and better placements are faster."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.messages import HostCost
from workloads.bench.placement_replay import SplitLevels
from workloads.bench.placement_requests import (
    BLOCK,
    Engine,
    Replayed,
    Request,
    read_requests,
    replay,
    summary,
)
from workloads.bench.placement_trace import Trace

TRACE = Trace("t", np.random.default_rng(0).zipf(1.5, (2, 300, 2)).clip(1, 8) - 1, 8)
COSTS = [HostCost(per_row_s=1e-4)] * 4
EVEN = [[[expert % 4] for expert in range(8)]] * 2
SPARE = [[[expert % 4, (expert + 1) % 4] for expert in range(8)]] * 2


def run(
    requests: Sequence[Request],
    placed: Sequence[Sequence[Sequence[int]]] = EVEN,
    engine: Engine | None = None,
) -> Replayed:
    return replay(TRACE, requests, 4, SplitLevels(placed, COSTS), engine or Engine())


def request(at_ms: float, prompt: int, answer: int, *blocks: int) -> Request:
    return Request(timestamp=at_ms, input_length=prompt, output_length=answer, hash_ids=blocks)


some_requests = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(1, 90), st.integers(0, 20)), min_size=1, max_size=12
).map(lambda rows: [request(*row) for row in sorted(rows)])


@given(some_requests, st.integers(1, 64), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_request_is_answered_and_every_token_computed_once(
    requests: list[Request], max_tokens: int, max_running: int
) -> None:
    found = run(requests, engine=Engine(max_tokens, max_running, 1e-3))
    assert found.requests == len(found.first_token_s) == len(requests)
    # The first answer comes with the prompt's last token.
    assert found.tokens == sum(r.input_length + max(1, r.output_length) - 1 for r in requests)
    assert found.first_token_s.min() > 0 and len(found.per_token_s) == sum(
        r.output_length > 1 for r in requests
    )
    assert found.seconds >= found.experts_s.sum() + found.steps * 1e-3 - 1e-9
    assert 0 < found.balance <= 1 and 0 < found.busy <= 1


def test_known_prefixes_are_not_computed_again() -> None:
    first = request(0, 2 * BLOCK, 1, 1, 2)
    assert run([first]).tokens == 2 * BLOCK
    assert run([first, request(10_000, 2 * BLOCK + 7, 1, 1, 2, 9)]).tokens == 2 * BLOCK + 7
    # What comes after another beginning is another prefix.
    assert run([first, request(10_000, 2 * BLOCK, 1, 3, 2)]).tokens == 4 * BLOCK


def test_a_better_placement_takes_less_time_and_the_numbers_say_so() -> None:
    requests = [request(100 * n, 50, 10) for n in range(20)]
    plain, spare = run(requests), run(requests, SPARE)
    assert spare.experts_s.sum() < 0.8 * plain.experts_s.sum() and spare.balance > plain.balance
    told = summary(spare)
    assert told["requests"] == 20 and told["experts_s_p50"] <= told["experts_s_p99"]


def test_files_are_read_gzipped_or_not_and_refused_by_line(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 5, "input_length": 3, "output_length": 2, "hash_ids": [1]},
        {"timestamp": 1, "input_length": 4, "output_length": 1},
    ]
    text = "\n".join(map(json.dumps, lines))
    plain, packed = tmp_path / "r.jsonl", tmp_path / "r.jsonl.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_requests(plain) == read_requests(packed) == [request(1, 4, 1), request(5, 3, 2, 1)]
    assert len(read_requests(plain, 1)) == 1
    plain.write_text(text + '\n{"timestamp": 1}')
    with pytest.raises(ConfigError, match=r"r.jsonl, line 3"):
        read_requests(plain)
    plain.write_text("")
    with pytest.raises(ConfigError, match="has no request"):
        read_requests(plain)
    with pytest.raises(ConfigError, match="can't be read"):
        read_requests(tmp_path / "none.jsonl")
