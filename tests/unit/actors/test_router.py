"""The router's own routes, over an engine that is a few methods: readiness, counters, keys, health."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from actors import router as module
from actors.api_access import key_digest
from actors.router import Router
from actors.router_metrics import MeshMetrics, RoutingMetrics, VersionMetrics
from actors.router_routes import finish
from cluster.live_versions import LiveVersions, Variant, serving
from cluster.messages import EngineSettings, RouterSpec
from cluster.routing_windows import LayerSummary
from cluster.table import PlacementTable
from cluster.traffic import Busiest, Routing

SETTINGS = EngineSettings("", "ab" * 32, (0,), "", 8, 2, "float32", 16, 1.0, 1.0)
STATS = {
    "dispatches": 5,
    "rows": 9,
    "seconds": 0.5,
    "slowest_seconds": 0.1,
    "slowest_table_seconds": 0.01,
    "lost": 1,
    "late": 0,
    "hedges": 0,
    "failovers": 0,
    "let_back": 0,
    "ejected": 0,
    "unanswered_rows": 0,
    "degraded_rows": 0,
    "capacity_coefficient": 1.5,
    "capacity_pairs": 40,
    "overflow_pairs": 3,
    "overflow_rerouted_rows": 0,
    "overflow_dropped_rows": 2,
    "overflow_deferred_steps": 0,
    "epoch": 3,
    "rss_bytes": 4096,
    "pid": 77,
}


class Engine:
    """What the router asks of vLLM's engine."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(bos_token_id=6))
        self.prompts: list[Any] = []
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.degraded: dict[str, str] = {}
        self.token_delay_s = 0.0
        self.closed = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.asked.append(method)
        if self.failure is not None:
            raise self.failure
        answers: dict[str, Any] = {
            "expertmesh_reachable": {"local-0": 25e-6},
            "expertmesh_stats": STATS,
            "expertmesh_set_table": 0,
        }
        return [answers[method]]

    async def generate(self, prompt: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        assert sampling.max_tokens == 1
        self.prompts.append(prompt)
        await asyncio.sleep(self.token_delay_s)
        yield SimpleNamespace(request_id=request_id)

    async def check_health(self) -> None:
        if self.failure is not None:
            raise self.failure

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Importing vLLM takes 20 seconds; two of its names are all that is needed here."""
    vllm, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    # The process's own registry takes each series once, and every test makes a router.
    monkeypatch.setattr(module, "MeshMetrics", lambda: MeshMetrics(CollectorRegistry()))
    monkeypatch.setattr(module, "RoutingMetrics", lambda: RoutingMetrics(CollectorRegistry()))
    monkeypatch.setattr(module, "VersionMetrics", lambda: VersionMetrics(CollectorRegistry()))
    return Engine()


def made(
    engine: Engine,
    keys: tuple[str, ...] = (),
    ready_timeout_s: float = 5.0,
    max_requests: int = 8,
    experts: Callable[[], str] | None = None,
) -> tuple[Router, FastAPI]:
    digests = tuple(key_digest(key) for key in keys)
    spec = RouterSpec(
        "/m", "m", SETTINGS, {}, {}, digests, max_requests, 20.0, ready_timeout_s, "127.0.0.1", 0
    )
    router = Router(spec, lambda: "", "node", experts=experts)
    router.engine = engine
    app = FastAPI()
    app.add_api_route("/v1/completions", lambda: {}, methods=["POST"])
    finish(app, router)
    return router, app


def get(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    return ask(app, "GET", path, **headers)


def ask(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(call())


def test_ready_says_so_once_hosts_and_a_token_answered(engine: Engine) -> None:
    answer = get(made(engine)[1], "/ready")
    assert (answer.status_code, answer.json()) == (
        200,
        {"ready": True, "host_round_trip_us": {"local-0": 25.0}},
    )
    assert engine.prompts == [{"prompt_token_ids": [6]}]


def test_a_host_that_does_not_answer_makes_it_503_with_the_reason(engine: Engine) -> None:
    engine.failure = RuntimeError("expert host local-0 could not be reached")
    answer = get(made(engine)[1], "/ready")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reason": "expert host local-0 could not be reached"}
    assert engine.prompts == []


def test_an_engine_that_hangs_is_not_ready_within_the_time(engine: Engine) -> None:
    engine.token_delay_s = 30.0
    answer = get(made(engine, ready_timeout_s=0.05)[1], "/ready")
    assert answer.status_code == 503
    assert answer.json()["reason"]


def test_who_asks_often_whether_it_is_ready_costs_one_token(engine: Engine) -> None:
    _, app = made(engine, keys=("secret",))

    async def many() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://test"
        ) as client:
            return await asyncio.gather(*(client.get("/ready") for _ in range(50)))

    assert [answer.status_code for answer in asyncio.run(many())] == [200] * 50
    assert get(app, "/ready").status_code == 200
    assert len(engine.prompts) == 1


def test_a_failure_is_not_remembered(engine: Engine) -> None:
    _, app = made(engine)
    engine.failure = RuntimeError("gone")
    assert get(app, "/ready").status_code == 503
    engine.failure = None
    assert get(app, "/ready").status_code == 200


def test_counters_want_a_key_and_readiness_does_not(engine: Engine) -> None:
    _, app = made(engine, keys=("secret",))
    assert get(app, "/ready").status_code == 200
    assert get(app, "/expertmesh/stats").status_code == 401
    assert get(app, "/expertmesh/stats", Authorization="Bearer secret").json() == STATS


def test_the_experts_are_told_to_those_who_have_a_key(engine: Engine) -> None:
    _, app = made(engine, keys=("secret",), experts=lambda: '{"epoch": 3}')
    assert get(app, "/expertmesh/experts").status_code == 401
    assert get(app, "/expertmesh/experts", Authorization="Bearer secret").json() == {"epoch": 3}


def test_a_controller_that_does_not_answer_is_said(engine: Engine) -> None:
    def gone() -> str:
        raise RuntimeError("long words\nthe controller died")

    answer = get(made(engine, experts=gone)[1], "/expertmesh/experts")
    assert answer.status_code == 503 and "the controller died" in answer.text
    assert get(made(engine)[1], "/expertmesh/experts").status_code == 503


def test_routing_is_exported_with_few_series() -> None:
    registry = CollectorRegistry()
    metrics = RoutingMetrics(registry)
    layers = {3: LayerSummary(4.0, 0.25, 5.5), 4: LayerSummary(1.0, 0.0, 8.0)}
    metrics.update(Routing(layers, (Busiest(3, 7, 0.5), Busiest(4, 1, 0.125))))
    metrics.update(Routing(layers, (Busiest(3, 2, 0.4),)))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"expertmesh_routing_{name}", labels)

    assert value("max_over_mean", layer="3") == 4.0 and value("dead_share", layer="3") == 0.25
    assert value("effective_experts", layer="4") == 8.0
    assert value("busiest_share", layer="3", expert="2") == 0.4
    assert value("busiest_share", layer="3", expert="7") is None, "it is not among the busiest any more"


def test_versions_have_series_for_as_long_as_they_live() -> None:
    registry = CollectorRegistry()
    metrics = VersionMetrics(registry)

    def value(name: str, manifest: str) -> float | None:
        return registry.get_sample_value(f"expertmesh_version_{name}", {"manifest": manifest})

    versions = LiveVersions("one", {"one": {}, "two": {}}, candidate="two", share=0.05)
    metrics.update(versions, {"one": 3, "two": 1}, {"one": 30, "two": 2})
    assert value("share", "one") == 0.95 and value("share", "two") == 0.05
    assert value("running", "one") == 3 and value("requests", "two") == 2
    metrics.update(LiveVersions("one", {"one": {}}), {}, {"one": 31})
    assert value("share", "one") == 1.0 and value("running", "one") == 0
    assert value("share", "two") is None and value("requests", "two") is None


def test_a_full_engine_refuses_requests_of_those_who_have_a_key(engine: Engine) -> None:
    _, app = made(engine, keys=("secret",), max_requests=0)
    assert ask(app, "POST", "/v1/completions").status_code == 401
    full = ask(app, "POST", "/v1/completions", Authorization="Bearer secret")
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert get(app, "/ready").status_code == 200
    _, app = made(engine)
    assert ask(app, "POST", "/v1/completions").status_code == 200


def test_a_new_table_reaches_the_engine_and_its_epoch_comes_back(engine: Engine) -> None:
    router, _ = made(engine)
    assert asyncio.run(router.set_table(PlacementTable("m", 4, {}, {}).to_json())) == 4
    assert engine.asked == ["expertmesh_set_table"]


def test_requests_get_a_version_that_the_engine_knows_before_it_hears_of_it(engine: Engine) -> None:
    router, _ = made(engine)
    versions = LiveVersions("one", {"one": {}, "two": {0: {0: 4}}}, variants={0: (Variant(0, "a"),)})
    table = PlacementTable("m", 4, {}, {}, versions=versions)

    async def run() -> None:
        await router.set_table(table.to_json())
        assert router.pins.versions.serving == "one" and engine.asked == ["expertmesh_set_table"]
        after = replace(table, epoch=5, versions=serving(versions, "two"))
        assert await router.set_table(after.to_json()) == 5
        assert router.pins.versions.serving == "two" and engine.asked == ["expertmesh_set_table"]
        # With another placement the engine comes first.
        await router.set_table(replace(table, epoch=6, manifest="other").to_json())
        assert router.pins.versions.serving == "one" and engine.asked == ["expertmesh_set_table"] * 3

    asyncio.run(run())


def test_health_is_the_engine_s_and_good_while_it_starts(engine: Engine) -> None:
    router, _ = made(engine)
    asyncio.run(router.check_health())
    engine.failure = RuntimeError("engine core died")
    with pytest.raises(RuntimeError, match="engine core died"):
        asyncio.run(router.check_health())
    router.engine = None
    asyncio.run(router.check_health())


def test_shutdown_ends_the_engine_even_before_it_started(engine: Engine) -> None:
    router, _ = made(engine)
    router.shutdown()
    assert engine.closed
    router.engine = None
    router.shutdown()


def test_the_engine_s_counters_become_series() -> None:
    registry = CollectorRegistry()
    MeshMetrics(registry).update(STATS)
    assert registry.get_sample_value("expertmesh_engine_dispatches") == 5
    assert registry.get_sample_value("expertmesh_engine_epoch") == 3
    assert registry.get_sample_value("expertmesh_engine_pid") is None
