"""Experts as `expertmesh experts` and the API show them: where they are, and how often they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import TypeAdapter

from cluster.controller import Controller
from cluster.errors import HostError
from cluster.messages import HostCost
from cluster.rebalancer import Rebalancer
from cluster.routing_windows import LayerSummary
from cluster.table import PlacementTable
from cluster.traffic import Busiest


@dataclass(frozen=True, slots=True)
class ExpertsReport:
    """All that is known of the experts and of the traffic."""

    epoch: int
    holders: Mapping[int, tuple[tuple[str, ...], ...]]
    """Layer index → per expert the hosts that hold it."""
    chosen: Mapping[int, tuple[int, ...]]
    """Layer index → per expert how often it was chosen in the last windows of the traffic."""
    layers: Mapping[int, LayerSummary]
    busiest: tuple[Busiest, ...]
    costs: Mapping[str, HostCost]
    """Per host, as the planner takes it: measured, and corrected by what was seen."""
    prediction_error: float | None
    """Median of |predicted - measured| over measured time of a step's experts."""
    predictions: int
    """Steps that it is of."""
    layer_error: float | None
    """The same of single layers' dispatches."""


EXPERTS: Final = TypeAdapter(ExpertsReport)
"""Writes a report as JSON."""


def experts_report(controller: Controller, rebalancer: Rebalancer) -> ExpertsReport:
    """The report. HostError while the hosts are starting."""
    statistics, snapshot = rebalancer.statistics(), controller.changes.snapshot()
    if snapshot is None:
        raise HostError("the hosts are still starting", "try again when `expertmesh status` says ready")
    table = PlacementTable.from_json(snapshot.deployment.table)
    counts = statistics.counts().sum(axis=0)
    chosen = {
        layer.index: tuple(int(n) for n in counts[row, : layer.num_experts])
        for row, layer in enumerate(statistics.layers)
    }
    routing = statistics.routing()
    return ExpertsReport(
        table.epoch,
        table.experts,
        chosen,
        routing.layers,
        routing.busiest,
        statistics.costs(snapshot.costs),
        statistics.prediction_error,
        statistics.predictions,
        statistics.layer_error,
    )
