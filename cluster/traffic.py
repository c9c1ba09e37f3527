"""What the controller knows of the traffic: which experts are asked for, and how long hosts really take.

Kept in memory only: a controller that was restarted learns it again within minutes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import TypeAdapter

from cluster.cost_fit import Timing, corrected, fit_median, next_factor
from cluster.messages import DispatchSample, HostCost, MoeLayer, Traffic
from cluster.routing_windows import LayerSummary, RoutingWindows, summary
from cluster.step_times import LayerTime, StepTimes

TRAFFIC: Final = TypeAdapter(Traffic)
"""Reads and writes a Traffic as JSON: engine processes send nothing else."""

_BUSIEST: Final = 10
# Samples that the transfer's cost is taken from.
_KEPT: Final = 512
# Steps that tell how much longer a step takes than its hosts' costs say: some fifteen seconds of one stream. On
# recorded traffic 8 were too few to tell, and 32 too slow to follow what else the machine did.
_STEPS: Final = 16


@dataclass(frozen=True, slots=True)
class Busiest:
    """An expert that many rows ask for."""

    layer: int
    expert: int
    share: float
    """Of its layer's rows."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How even the router's choices are, in few numbers: bounded, however many experts there are."""

    layers: Mapping[int, LayerSummary]
    busiest: tuple[Busiest, ...]
    """The experts that are asked for most, of all layers."""


class TrafficStatistics:
    """Of one deployment. Used under a lock of its owner's."""

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self.layers = tuple(layers)
        width = max((layer.num_experts for layer in layers), default=1)
        self._windows = RoutingWindows(len(self.layers), width)
        self._measured: dict[str, HostCost] = {}
        self._factors: dict[str, float] = {}
        self._seen: dict[str, deque[Timing]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._fitted: dict[str, HostCost] = {}
        self._samples: deque[DispatchSample] = deque(maxlen=_KEPT)
        self._steps = StepTimes()
        self._last: deque[list[DispatchSample]] = deque(maxlen=_STEPS)
        self._overhead = HostCost(0.0, 0.0, 1e-12)
        self._pairs = self._dispatches = 0.0

    def add(self, traffic: Traffic, measured: Mapping[str, HostCost]) -> None:
        """Take in what an engine counted; `measured` are the hosts' costs as they were at their start."""
        counts = np.zeros((len(self.layers), max(layer.num_experts for layer in self.layers)))
        for row, layer in enumerate(self.layers):
            chosen = traffic.chosen.get(layer.index, ())
            counts[row, : len(chosen)] = chosen
        pairs = float(counts.sum())
        if pairs:
            # Every token asks every layer, top-k times.
            self._windows.add(counts, round(pairs / len(self.layers)))
        # Decayed, as the windows are.
        self._pairs = 0.8 * self._pairs + pairs
        self._dispatches = 0.8 * self._dispatches + traffic.dispatches
        self._learn(traffic.samples, measured)

    def counts(self) -> np.ndarray:
        """float64 [S, L, E]: how often each expert was chosen, window by window, oldest first."""
        return self._windows.counts()

    @property
    def rows_per_step(self) -> float:
        """Pairs of row and expert that a layer is asked for at once, on average; 1 without any traffic."""
        return max(1.0, self._pairs / self._dispatches) if self._dispatches else 1.0

    def costs(self, measured: Mapping[str, HostCost]) -> dict[str, HostCost]:
        """The hosts' costs as a step meets them: measured, corrected by what was seen, transfer included."""
        return {
            host_id: corrected(self._now(host_id, cost), self._steps.factor)
            for host_id, cost in measured.items()
        }

    @property
    def prediction_error(self) -> float | None:
        """Median of |predicted - measured| over measured time of a step's experts, all layers; None without a sample.

        Each step was predicted before it was learnt from.
        """
        return self._steps.error

    @property
    def layer_error(self) -> float | None:
        """The same of single layers, which the sum over a step levels out."""
        return self._steps.layer_error

    @property
    def predictions(self) -> int:
        """Steps that this error is of, the last ones."""
        return self._steps.judged

    def summaries(self) -> dict[int, LayerSummary]:
        """Per layer three numbers, however many experts there are."""
        counts = self.counts().sum(axis=0)
        return {
            layer.index: summary(counts[row, : layer.num_experts]) for row, layer in enumerate(self.layers)
        }

    def routing(self) -> Routing:
        """What is exported of the choices."""
        return Routing(self.summaries(), tuple(self.busiest(_BUSIEST)))

    def busiest(self, number: int) -> list[Busiest]:
        """The experts that are asked for most, of all layers."""
        counts = self.counts().sum(axis=0)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        order = np.argsort(-shares, axis=None, kind="stable")[:number]
        return [
            Busiest(
                self.layers[at // shares.shape[1]].index, int(at % shares.shape[1]), float(shares.flat[at])
            )
            for at in order
            if shares.flat[at] > 0
        ]

    def _now(self, host_id: str, cost: HostCost) -> HostCost:
        cost, overhead = self._computing(host_id, cost), self._overhead
        return HostCost(
            cost.fixed_s + overhead.fixed_s, cost.per_expert_s, cost.per_row_s + overhead.per_row_s
        )

    def _computing(self, host_id: str, measured: HostCost) -> HostCost:
        """What computing costs a host: as it is seen to, or while little was seen, as measured and corrected."""
        return self._fitted.get(host_id) or corrected(measured, self._factors.get(host_id, 1.0))

    def _learn(self, samples: Sequence[DispatchSample], measured: Mapping[str, HostCost]) -> None:
        for host_id, cost in measured.items():
            if self._measured.setdefault(host_id, cost) != cost:
                # It began anew, on another machine perhaps.
                self._measured[host_id] = cost
                self._factors.pop(host_id, None)
                self._fitted.pop(host_id, None)
                self._seen.pop(host_id, None)
                self._forget_steps_with(host_id)
        known = [
            sample
            for sample in samples
            if sample.parts and all(part.host_id in measured for part in sample.parts) and sample.seconds > 0
        ]
        steps: dict[int, list[DispatchSample]] = defaultdict(list)
        for sample in known:
            steps[sample.step].append(sample)
        if self._samples:
            self._steps.judge(self._timed(steps.values(), measured))
        self._last.extend(steps.values())
        by_host: dict[str, list[Timing]] = defaultdict(list)
        for sample in known:
            for part in sample.parts:
                if part.compute_s > 0:
                    by_host[part.host_id].append(Timing(part.pairs, part.experts, part.compute_s))
        for host_id, seen in by_host.items():
            # A step for every handful, so that many samples say more than one.
            for start in range(0, len(seen), _HANDFUL):
                self._factors[host_id] = next_factor(
                    self._factors.get(host_id, 1.0), measured[host_id], seen[start : start + _HANDFUL]
                )
            self._seen[host_id].extend(seen)
            if len(self._seen[host_id]) >= _ENOUGH:
                self._fitted[host_id] = fit_median(self._seen[host_id])
        self._samples.extend(known)
        rests = [
            Timing(sum(part.pairs for part in s.parts), 0.0, s.seconds - max(p.compute_s for p in s.parts))
            for s in self._samples
            if s.seconds > max(p.compute_s for p in s.parts)
        ]
        if len(rests) >= _HANDFUL:
            self._overhead = fit_median(rests)
        there = [step for step in self._last if _hosts(step) <= measured.keys()]
        self._steps.learn(self._timed(there, measured))

    def _forget_steps_with(self, host_id: str) -> None:
        kept = [step for step in self._last if host_id not in _hosts(step)]
        self._last.clear()
        self._last.extend(kept)

    def _timed(
        self, steps: Iterable[Sequence[DispatchSample]], measured: Mapping[str, HostCost]
    ) -> list[list[LayerTime]]:
        """The steps, predicted by what is known now."""
        return [[LayerTime(self._predicted(s, measured), s.seconds) for s in step] for step in steps]

    def _predicted(self, sample: DispatchSample, measured: Mapping[str, HostCost]) -> float:
        computed = max(
            self._computing(part.host_id, measured[part.host_id]).seconds(part.pairs, part.experts)
            for part in sample.parts
        )
        return computed + self._overhead.seconds(sum(part.pairs for part in sample.parts), 0.0)


_HANDFUL: Final = 16
# Samples of a host from which its cost is taken anew.
_ENOUGH: Final = 64


def _hosts(step: Sequence[DispatchSample]) -> set[str]:
    return {part.host_id for sample in step for part in sample.parts}
