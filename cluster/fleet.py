"""What the planner knows of the machines, of the traffic, and of what the operator wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cluster.messages import HostCost


@dataclass(frozen=True, slots=True)
class FleetHost:
    """One expert host as the planner sees it."""

    host_id: str
    memory_bytes: int
    """For blobs; 0 for a host that is to be emptied."""
    cost: HostCost = field(default_factory=HostCost)
    group: str = "local"
    node: str = ""
    zone: str = ""
    device: str = "cpu"
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerLoad:
    """What one layer is asked for in a step, in several scenarios: windows of the traffic, oldest first.

    One average would do for a placement that never sees anything else; scenarios show how far loads stray.
    """

    layer: int
    blob_bytes: int
    rows: np.ndarray
    """float64 [S, E]: rows of each expert."""
    touch: np.ndarray
    """float64 [S, E]: share of the steps that ask for the expert at all."""


def layer_load(layer: int, blob_bytes: int, counts: np.ndarray, rows_per_step: float) -> LayerLoad:
    """The load of steps with so many (row, expert) pairs, from how often each expert was chosen [S, E].

    Every scenario counts as much as any other, however many tokens it has. Rows are taken to come independently:
    an expert of r rows a step is touched in 1 - exp(-r) of the steps. A layer nobody asked for is asked evenly.
    """
    totals = counts.sum(axis=1, keepdims=True)
    even = np.full_like(counts, 1 / counts.shape[1], dtype=np.float64)
    share = np.divide(counts, totals, out=even, where=totals > 0)
    rows = share * rows_per_step
    return LayerLoad(layer, blob_bytes, rows, -np.expm1(-rows))


@dataclass(frozen=True, slots=True)
class Pin:
    """Ties experts to hosts of a device class, or with certain labels."""

    experts: Mapping[int, tuple[int, ...]]
    """Layer → experts."""
    device: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def wish(self) -> str:
        """What hosts must be, in words."""
        device = [f"device {self.device}"] if self.device is not None else []
        return ", ".join(device + [f"{key}={value}" for key, value in self.labels.items()])

    def admits(self, host: FleetHost) -> bool:
        """Whether the experts may be on this host."""
        fits = self.device is None or self.device == host.device
        return fits and all(host.labels.get(key) == value for key, value in self.labels.items())


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What is asked of a plan."""

    redundancy: float | None = None
    """Copies of a layer's experts, over their number; all the room that there is if None."""
    min_replicas: int = 1
    """Copies that every expert must have, in as many distinct failure domains."""
    spread: Literal["host", "node", "zone"] = "host"
    """What a failure domain is."""
    pins: tuple[Pin, ...] = ()
    max_moves: int | None = None
    """Most blobs that hosts may have to load beyond what they hold now, unless an expert would lack copies."""
    gain_per_move: float = 0.0
    """What a blob that is loaded must gain at least, as a share of the layer's time."""
    tries: int = 3000
    """Moves of a layer that the search looks at."""
    seed: int = 0
