from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from actors.router_metrics import queue
from cluster.group_loads import Queue


def test_the_queue_is_what_vllm_counted_but_no_more_than_is_in_flight() -> None:
    registry = CollectorRegistry()
    assert queue(3, registry) is None
    labels = ["model_name", "engine"]
    running = Gauge("vllm:num_requests_running", "-", labels, registry=registry)
    waiting = Gauge("vllm:num_requests_waiting", "-", labels, registry=registry)
    Gauge("vllm:num_requests_waiting_by_reason", "-", [*labels, "reason"], registry=registry).labels(
        "m", "0", "capacity"
    ).set(9)
    assert queue(3, registry) is None
    running.labels("m", "0").set(4)
    waiting.labels("m", "0").set(7)
    assert queue(20, registry) == Queue(7, 4)
    running.labels("m", "1").set(1)
    waiting.labels("m", "1").set(2)
    assert queue(20, registry) == Queue(9, 5)
    # All but six were aborted, and vLLM has made no step since.
    assert queue(6, registry) == Queue(1, 5)
    assert queue(0, registry) == Queue(0, 0)
