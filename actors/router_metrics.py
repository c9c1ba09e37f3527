"""The mesh's own Prometheus series in the router process, beside vLLM's in the same registry."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from cluster.group_loads import Queue
from cluster.live_versions import LiveVersions, share_of
from cluster.traffic import Routing

_SERIES = {
    "dispatches": "Dispatches to the expert hosts since start (one per MoE layer and step)",
    "rows": "Activation rows dispatched since start",
    "seconds": "Seconds spent between dispatch and combine since start",
    "slowest_seconds": "The longest time between dispatch and combine since start",
    "slowest_table_seconds": "The longest that taking up another placement table took since start",
    "lost": "Connections to expert hosts that ended since start",
    "late": "Answers of expert hosts that were late since start",
    "hedges": "Dispatches whose late rows were sent to another replica since start",
    "failovers": "Dispatches in which another replica answered for a lost host since start",
    "let_back": "Expert hosts that were asked again after they had been out since start",
    "ejected": "Expert hosts of the placement table that are out now",
    "unanswered_rows": "Rows that no living replica could answer for since start",
    "degraded_rows": "Rows computed without an expert that has no living replica since start",
    "capacity_coefficient": "Coefficient of the experts' capacity, adapted to the overflow; 0 without a capacity",
    "capacity_pairs": "Pairs of row and expert that a capacity was held against since start",
    "overflow_pairs": "Pairs of row and expert that were over the capacity since start",
    "overflow_rerouted_rows": "Rows that went to a next choice of their router for want of capacity since start",
    "overflow_dropped_rows": "Rows computed without an expert that was over its capacity since start",
    "overflow_deferred_steps": "Steps that took fewer tokens than waited, for an overflow before, since start",
    "epoch": "Epoch of the placement table in use",
    "rss_bytes": "Resident memory of the engine process",
}
# vLLM's own, of this process's engine.
_WAITING, _RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"


def queue(in_flight: int, registry: CollectorRegistry = REGISTRY) -> Queue | None:
    """The engine's requests as vLLM last counted them; None before it has.

    vLLM counts at each of its steps. There are none when the last requests were aborted, so no more are believed than
    are `in_flight`.
    """
    found: dict[str, float] = {}
    for metric in registry.restricted_registry((_WAITING, _RUNNING)).collect():
        for sample in metric.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    if _WAITING not in found or _RUNNING not in found:
        return None
    running = min(found[_RUNNING], in_flight)
    return Queue(min(found[_WAITING], in_flight - running), running)


class VersionMetrics:
    """`expertmesh_version_*` by manifest, of the versions that are live or have requests running."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        label = ["manifest"]
        self._running = Gauge("expertmesh_version_running", "Requests inside now", label, registry=registry)
        self._admitted = Gauge(
            "expertmesh_version_requests", "Requests admitted since start", label, registry=registry
        )
        self._share = Gauge(
            "expertmesh_version_share", "Of new requests that get it", label, registry=registry
        )

    def update(self, versions: LiveVersions, running: Mapping[str, int], admitted: Mapping[str, int]) -> None:
        """Take what one replica of the router knows."""
        for gauge in (self._running, self._admitted, self._share):
            gauge.clear()
        for name in {*versions.live, *running}:
            self._share.labels(name).set(share_of(versions, name))
            self._running.labels(name).set(running.get(name, 0))
            self._admitted.labels(name).set(admitted.get(name, 0))


class MeshMetrics:
    """Gauges named `expertmesh_engine_*`, set from the engine process's counters."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._gauges = {
            name: Gauge(f"expertmesh_engine_{name}", text, registry=registry)
            for name, text in _SERIES.items()
        }

    def update(self, stats: Mapping[str, float]) -> None:
        """Take over the counters of `WorkerExtension.expertmesh_stats`."""
        for name, gauge in self._gauges.items():
            gauge.set(stats[name])


class RoutingMetrics:
    """Gauges named `expertmesh_routing_*`: three per layer and the few busiest experts, however many there are."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ("layer",)) -> Gauge:
            return Gauge(f"expertmesh_routing_{name}", text, labels, registry=registry)

        self._max_over_mean = gauge(
            "max_over_mean", "Choices of the layer's busiest expert over those of the mean one"
        )
        self._dead_share = gauge("dead_share", "Share of the layer's experts that nobody chose lately")
        self._effective = gauge(
            "effective_experts", "Equally busy experts that would be as uneven (exp of entropy)"
        )
        self._busiest = gauge(
            "busiest_share", "Share of its layer's choices, of the few busiest experts", ("layer", "expert")
        )

    def update(self, routing: Routing) -> None:
        """Take over what the controller knows of all engines' choices."""
        for layer, summary in routing.layers.items():
            self._max_over_mean.labels(layer).set(summary.max_over_mean)
            self._dead_share.labels(layer).set(summary.dead_share)
            self._effective.labels(layer).set(summary.effective_experts)
        # Who is not among them any more is not to stay with the share that it had.
        self._busiest.clear()
        for found in routing.busiest:
            self._busiest.labels(found.layer, found.expert).set(found.share)
