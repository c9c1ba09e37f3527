"""How learning goes, as Prometheus series: `expertmesh learn serve --metrics-port`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.errors import LearningError
from cluster.learning.drift import DriftState
from cluster.learning.journal import LoopState

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a loop knows at one time."""

    loop: LoopState = field(default_factory=LoopState)
    waiting: Mapping[str, int] = field(default_factory=dict)
    """Domain → samples that no round has used."""
    drift: DriftState = field(default_factory=DriftState)


class LearningMetrics(Collector):
    """Shows what it was told last: the loop tells it between its steps, Prometheus asks when it likes."""

    def __init__(self) -> None:
        self.seen = Seen()

    def collect(self) -> Iterator[Metric]:
        """All series."""
        return families(self.seen)


def families(seen: Seen) -> Iterator[Metric]:
    """The series of what is known; a domain that nothing is known of has none."""
    loop, drift = seen.loop, seen.drift
    yield CounterMetricFamily("expertmesh_learning_rounds", "Rounds that were begun", loop.rounds)
    ended = GaugeMetricFamily(
        "expertmesh_learning_round_ended_timestamp_seconds",
        "When a domain's last round with this outcome ended",
        labels=["domain", "outcome"],
    )
    for (domain, outcome), at in {(past.domain, past.phase): past.ended for past in loop.past}.items():
        ended.add_metric([domain, outcome], at)
    yield ended
    now = GaugeMetricFamily(
        "expertmesh_learning_round_began_timestamp_seconds",
        "When the round that goes on began",
        labels=["domain", "phase"],
    )
    if loop.now is not None:
        now.add_metric([loop.now.domain, loop.now.phase], loop.now.began)
    yield now
    yield _by_domain("waiting_samples", "Samples that no round has used", seen.waiting)
    yield from _drift(drift)


def _drift(drift: DriftState) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "expertmesh_learning_drift_looked_timestamp_seconds",
        "When text was last read to see whether what serves gets worse",
        drift.at,
    )
    yield GaugeMetricFamily(
        "expertmesh_learning_drift_trouble", "1 if the last look came to nothing", bool(drift.trouble)
    )
    tracks = sorted(drift.tracks.items())
    bits = GaugeMetricFamily(
        "expertmesh_learning_bits_per_byte",
        "What the version that serves took for a domain's text in the last look that read some",
        labels=["domain", "text"],
    )
    evidence = GaugeMetricFamily(
        "expertmesh_learning_drift_evidence",
        "That a domain gets worse: an alarm at 1 / learning.drift.false_alarms",
        labels=["domain", "text"],
    )
    for domain, track in tracks:
        held = next((point.holdout for point in reversed(track.points) if point.holdout is not None), None)
        live = next((point.live for point in reversed(track.points) if point.live is not None), None)
        for text, found, detector in (("holdout", held, track.holdout), ("live", live, track.live)):
            evidence.add_metric([domain, text], detector.evidence)
            if found is not None:
                bits.add_metric([domain, text], found)
    yield bits
    yield evidence
    yield _by_domain(
        "drift_alarm",
        "1 from an alarm until a round of the domain has ended",
        {domain: track.alarm is not None for domain, track in tracks},
    )
    alarms = CounterMetricFamily("expertmesh_learning_drift_alarms", "Alarms ever", labels=["domain"])
    for domain, track in tracks:
        alarms.add_metric([domain], track.alarms)
    yield alarms


def _by_domain(name: str, documentation: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"expertmesh_learning_{name}", documentation, labels=["domain"])
    for domain, value in sorted(values.items()):
        family.add_metric([domain], value)
    return family


@contextlib.contextmanager
def served(metrics: LearningMetrics, port: int | None) -> Iterator[None]:
    """For the block at ``http://127.0.0.1:PORT/metrics``, if there is a port. LearningError if it is taken."""
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(port, _HOST, registry)
    except OSError as error:
        raise LearningError(
            f"metrics can't be told at {_HOST}:{port}: {error.strerror}", "choose another --metrics-port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
