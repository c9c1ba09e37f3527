"""Series of how learning goes."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import LearningError
from cluster.learning.drift import Alarm, DriftState, Point, Track
from cluster.learning.journal import LoopState, Round
from tests.e2e.programs import free_port
from workloads.learn_metrics import LearningMetrics, Seen, served

CODE = Round(1, "code", 0, 2, "aa", 0, 0, began=10.0, phase="promoted", ended=20.0)
LOOP = LoopState(rounds=2, past=(CODE,), now=Round(2, "law", 0, 3, "aa", 0, 0, began=30.0, phase="training"))
POINTS = (Point(1.0, "aa", 1.5, 0.0, 2.5, (4, 4)), Point(2.0, "aa", 1.6, 0.1, None, (4, 0)))
DRIFT = DriftState(
    {"code": Track(points=POINTS, alarm=Alarm("holdout", 2.0, "aa", "worse"), alarms=3), "law": Track()},
    at=2.0,
)


def told(port: int) -> dict[tuple[str, frozenset[str]], float]:
    """Name and values of labels → value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name.removeprefix("expertmesh_learning_"), frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_the_loop_knows_is_told() -> None:
    metrics, port = LearningMetrics(), free_port()
    with served(metrics, port):
        before = told(port)
        assert before["rounds_total", frozenset()] == 0 and not [name for name, labels in before if labels]
        metrics.seen = Seen(LOOP, {"law": 7}, DRIFT)
        found = told(port)
    assert found["rounds_total", frozenset()] == 2
    assert found["round_ended_timestamp_seconds", frozenset({"code", "promoted"})] == 20
    assert found["round_began_timestamp_seconds", frozenset({"law", "training"})] == 30
    assert found["waiting_samples", frozenset({"law"})] == 7
    # The last look that read some: of live text that was the one before.
    assert found["bits_per_byte", frozenset({"code", "holdout"})] == 1.6
    assert found["bits_per_byte", frozenset({"code", "live"})] == 2.5
    assert ("bits_per_byte", frozenset({"law", "live"})) not in found
    assert (found["drift_alarm", frozenset({"code"})], found["drift_alarm", frozenset({"law"})]) == (1, 0)
    assert found["drift_alarms_total", frozenset({"code"})] == 3


def test_a_port_that_is_taken_is_named_and_one_is_given_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(LearningError, match=f"127.0.0.1:{port}") as error,
            served(LearningMetrics(), port),
        ):
            pass
        assert "--metrics-port" in error.value.hint
    for _ in range(2):
        with served(LearningMetrics(), port):
            assert told(port)


def test_without_a_port_nobody_listens() -> None:
    with served(LearningMetrics(), None):
        pass
