"""What the planner knows of the machines, of the traffic, and of what the operator wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cluster.inventory import matches
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
    """Ties experts to hosts of a device class or a group, or on nodes with certain labels."""

    experts: Mapping[int, tuple[int, ...]]
    """Layer → experts."""
    device: str | None = None
    group: str | None = None
    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels of the hosts' nodes, in Ray's notation: ``b``, ``!b``, ``in(a, b)`` or ``!in(a, b)``."""

    @property
    def wish(self) -> str:
        """What hosts must be, in words."""
        named = (("device", self.device), ("group", self.group))
        words = [f"{name} {value}" for name, value in named if value is not None]
        return ", ".join(words + [f"{key}: {value}" for key, value in self.selector.items()])

    def admits(self, host: FleetHost) -> bool:
        """Whether the experts may be on this host."""
        fits = self.device in (None, host.device) and self.group in (None, host.group)
        return fits and matches(self.selector, host.labels)


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What is asked of a plan."""

    redundancy: float | None = None
    """Copies of a layer's experts, over their number; all the room that there is if None."""
    min_replicas: int = 1
    """Copies that every expert must have, in as many distinct failure domains."""
    least: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The same by layer and expert, for layers whose experts differ."""
    spread: Literal["host", "node", "zone"] = "host"
    """What a failure domain is."""
    apart: int | None = None
    """In so many failure domains an expert's copies must be at most; None: in as many as it must have copies."""
    pins: tuple[Pin, ...] = ()
    max_moves: int | None = None
    """Most blobs that hosts may have to load beyond what they hold now, unless an expert would lack copies."""
    gain_per_move: float = 0.0
    """What a blob that is loaded must gain at least, as a share of the layer's time."""
    tries: int = 6000
    """Moves of a layer that the search looks at; fewer where there are many copies."""
    seed: int = 0
