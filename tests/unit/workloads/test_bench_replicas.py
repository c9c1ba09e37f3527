"""The replicas measurement: who is asked when, ratios, bars, what both servers are, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from rich.console import Console
from typer.testing import CliRunner

from cluster.config import Config, HostGroup, RayConfig, ServerConfig, load_config
from cluster.config_placement import PlacementConfig, ReplicaRules
from cluster.errors import ConfigError, ExpertmeshError
from workloads.bench import load
from workloads.bench.load import AllSeries, Load, Series, ask_in_turn, block, itl_ratio, throughput_ratio
from workloads.bench.replicas import (
    Model,
    Settings,
    bars,
    check_comparable,
    deployment,
    report,
    show,
)
from workloads.cli import app

positive = st.floats(1e-3, 1e6)


def two_servers(
    one: Sequence[float], two: Sequence[float], itl: tuple[float, float] = (4.0, 5.0)
) -> AllSeries:
    """Series of a run with these tokens per second at concurrency 16."""
    found = {}
    for who, tokens, ms in (("one", one, itl[0]), ("two", two, itl[1])):
        found[who, 1] = Series([10.0] * len(tokens), [ms, ms, ms], [20.0])
        found[who, 16] = Series(list(tokens), [2 * ms, 3 * ms], [40.0])
    return found


def test_throughput_is_compared_round_by_round() -> None:
    # The machine halves its speed for a round: each ratio stays, only the ratio of the medians would change.
    series = two_servers([100, 50, 200], [99, 49.5, 180])
    assert throughput_ratio(series, "two", "one") == pytest.approx(0.99)
    assert itl_ratio(series, "two", "one") == pytest.approx(1.25)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=9), st.floats(0.5, 2.0))
def test_a_server_that_is_always_so_much_faster_has_that_ratio(
    speeds: list[tuple[float, float]], factor: float
) -> None:
    one = [speed for speed, _ in speeds]
    assert throughput_ratio(two_servers(one, [s * factor for s in one]), "two", "one") == pytest.approx(
        factor
    )


def test_rounds_that_one_server_lacks_are_no_ratio() -> None:
    with pytest.raises(ValueError):
        throughput_ratio(two_servers([1, 2], [1]), "two", "one")


def test_a_block_counts_every_token_and_the_gaps_within_an_answer() -> None:
    series = Series()
    series.add(Load(2, 32, 3), 0.5, [[0.0, 0.1, 0.2, 0.4], [0.0, 0.2, 0.3, 0.5]])
    assert series.tokens_per_s == [12.0]
    assert series.ttft_ms == pytest.approx([100, 200])
    assert series.itl_ms == pytest.approx([100, 200, 100, 200])


def test_both_are_asked_the_same_each_first_in_turn_and_the_warming_round_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int, list[list[int]]]] = []

    async def answer(
        url: str, name: str, prompts: list[list[int]], sent: Load
    ) -> tuple[float, list[list[float]]]:
        asked.append((url, sent.concurrency, prompts))
        return 1.0, [[0.0, 1.0, 2.0]] * sent.concurrency

    monkeypatch.setattr(load, "block", answer)
    over: list[int] = []
    series = ask_in_turn(
        {"one": "a", "two": "b"}, "m", 512, rounds=4, seed=3, output_tokens=8, on_round=over.append
    )
    assert over == [1, 2, 3, 4, 5]
    assert [(url, size) for url, size, _ in asked[:8]] == [
        *(("a", 1), ("b", 1), ("a", 16), ("b", 16)),
        *(("b", 1), ("a", 1), ("b", 16), ("a", 16)),
    ]
    firsts = [url for url, _, _ in asked[4::2]]
    assert firsts.count("a") == firsts.count("b") == 4
    for (_, _, prompts), (_, _, others) in zip(asked[::2], asked[1::2], strict=True):
        assert prompts == others
    assert (
        len({str(prompts) for _, _, prompts in asked}) == 10
    )  # no prompt is sent twice to be found in a cache
    assert set(series) == {("one", 1), ("two", 1), ("one", 16), ("two", 16)}
    assert all(len(each.tokens_per_s) == 4 for each in series.values())


@given(st.integers(2, 100_000), st.integers(0, 9))
def test_prompts_are_ids_of_the_vocabulary(vocabulary: int, seed: int) -> None:
    made = load.prompts(random.Random(seed), Load(3, 5, 1), vocabulary)
    assert [len(prompt) for prompt in made] == [5, 5, 5]
    assert all(0 <= token < vocabulary for prompt in made for token in prompt)


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that gives every request this answer; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_block_times_every_token() -> None:
    with answering(200, 'data: {"choices": []}\n\n' * 3 + "data: [DONE]\n\n") as url:
        seconds, times = asyncio.run(block(url, "m", [[1], [2]], Load(2, 1, 3)))
    assert [len(request) for request in times] == [4, 4]
    assert all(list(request) == sorted(request) and request[-1] - request[0] <= seconds for request in times)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (503, "no host", "answered 503: no host"),
        (200, 'data: {"choices": []}\n\ndata: {"error": {"message": "gone"}}\n\n', "broke an answer off"),
        (200, "data: [DONE]\n\n", "without a token"),
    ],
)
def test_an_answer_that_fails_is_one_error(status: int, body: str, words: str) -> None:
    with answering(status, body) as url, pytest.raises(ExpertmeshError, match=words):
        asyncio.run(block(url, "m", [[1]], Load(1, 1, 3)))


def test_a_server_that_is_gone_is_one_error() -> None:
    with answering(200, "") as url:
        pass
    with pytest.raises(ExpertmeshError, match="did not answer"):
        asyncio.run(block(url, "m", [[1]], Load(1, 1, 3)))


@pytest.mark.parametrize(
    ("ratio", "out", "met"),
    [(0.98, 0, [True, True]), (0.9799, 0, [False, True]), (1.1, 1, [True, False])],
)
def test_bars(ratio: float, out: float, met: list[bool]) -> None:
    found = bars(ratio, out)
    assert [bar.key for bar in found] == ["throughput_ratio", "hosts_out"]
    assert [bar.met for bar in found] == met


GAUGES = {
    "engine_rss_mb": 1.0, "hosts_rss_mb": 2.0, "hosts_out": 0,
    "lost": 0, "late": 3, "hedges": 2, "failovers": 0,
}  # fmt: skip


def test_the_report_has_its_keys_and_is_shown() -> None:
    model = Model(Config(), "tiny", 512)
    found = report(
        model,
        Settings(3, 8, 7, None),
        two_servers([100, 50, 200], [97, 48.5, 194]),
        {"one": GAUGES, "two": GAUGES},
        "2026-01-01T00:00:00+00:00",
    )
    found = json.loads(json.dumps(found, allow_nan=False))
    assert (found["command"], found["seed"], found["rounds"]) == ("bench replicas", 7, 3)
    assert found["throughput_ratio"] == found["bars"]["throughput_ratio"]["value"] == pytest.approx(0.97)
    assert found["itl_ratio"] == pytest.approx(1.25)
    assert [(row["server"], row["concurrency"]) for row in found["results"]] == [
        *(("one", 1), ("one", 16), ("two", 1), ("two", 16))
    ]
    assert [(row["server"], row["replicas"]) for row in found["servers"]] == [("one", 1), ("two", 2)]
    assert all(set(row) == {"server", "replicas", *GAUGES} for row in found["servers"])
    assert "two_16_tokens_per_s" in found["series"]
    out = io.StringIO()
    show(found, Console(file=out, width=160))
    assert "missed  throughput_ratio 0.97 ≥ 0.98" in out.getvalue()
    assert "met  hosts_out 0 ≤ 0" in out.getvalue()


def test_the_two_servers_differ_in_replicas_and_port_alone(tmp_path: Path) -> None:
    base = Config(
        hosts=(HostGroup(name="h", count=3, threads=1),),
        server=ServerConfig(host="0.0.0.0", api_keys=(SecretStr("k" * 20),)),
        placement=PlacementConfig(replicas=ReplicaRules(layers={0: 2}), no_replica="drop"),
    )
    one, two = deployment(base, 1, 8101), deployment(base, 2, 8102)
    assert (one.placement.replicas, two.placement.replicas) == (1, 2)
    assert (one.server.port, two.server.port) == (8101, 8102)
    assert one.model_copy(update={"placement": two.placement, "server": two.server}) == two
    assert one.hosts == (base.hosts[0].model_copy(update={"count": 2}),)
    assert (one.server.host, one.server.api_keys) == ("127.0.0.1", ())
    assert one.placement.no_replica == "drop"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(ray=RayConfig(address="10.0.0.1:6379")), "ray.address"),
        (Config(hosts=(HostGroup(name="a"), HostGroup(name="b"))), "2 host groups"),
    ],
)
def test_what_can_not_be_compared_is_refused(config: Config, words: str) -> None:
    check_comparable(Config())
    with pytest.raises(ConfigError, match=words):
        check_comparable(config)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """`expertmesh bench replicas ...` in an empty folder; what it raised."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["bench", "replicas", *arguments]).exception


def test_mistakes_are_told_before_anything_starts(invoke: Callable[..., object], tmp_path: Path) -> None:
    told = invoke("--json", "/nowhere/x.json", "--model", "/no/model")
    assert isinstance(told, ConfigError) and "no such folder" in str(told)
    (tmp_path / "far.yaml").write_text("ray: {address: '10.0.0.1:6379'}\n")
    assert load_config(tmp_path / "far.yaml", {}, {}).config.ray.address != "local"
    told = invoke("--config", "far.yaml", "--model", "/no/model")
    assert isinstance(told, ConfigError) and "ray.address" in str(told)
