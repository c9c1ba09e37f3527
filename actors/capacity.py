"""A bound on the rows that an expert gets in one step, between the router's choice and the dispatch.

Called in place of the dispatcher, which comes next; an engine without a bound calls the dispatcher itself. What is
over the bound is, as the operator chose,

    reroute   given to the gate's next choice that has room, with the weight that the gate gives that one
    drop      left out, the row's other weights scaled up
    defer     computed all the same; `actors.capacity_scheduler` takes fewer tokens into the next step

Shape suffixes: T = tokens of the step, K = top-k, H = hidden size, E = experts of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from actors.dispatch import Dispatcher
from actors.outages import Outages
from actors.rescue import Outage
from actors.route import NOBODY
from cluster.capacity import adapt, capacity, drop, load, overflow
from cluster.gate import NEVER, Gate
from cluster.messages import CapacitySettings
from cluster.next_choice import next_choices


class CapacityLimit:
    """Bounds what `dispatcher` is asked for. One per engine process, used by the thread that steps.

    `largest` is the most rows that a step may have. `gates` says how each layer chooses, for `reroute`, where the
    gate's logits come behind the weights; else it is empty. `outages` knows which rows are of requests: those of
    warm-up and padding are not counted, and pass.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: CapacitySettings,
        *,
        largest: int,
        gates: Mapping[int, Gate],
        outages: Outages,
    ) -> None:
        self.settings, self.largest = settings, largest
        self.stats = dispatcher.stats
        self.stats.capacity_coefficient = settings.coefficient
        self._dispatcher, self._gates, self._outages = dispatcher, gates, outages
        dispatcher.counts_routing = False
        self._step_pairs = self._step_over = self._step_rows = 0

    def __call__(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
    ) -> None:
        """As the dispatcher's; with gates, `weights_TK` is [T, K + E]."""
        logits_TE = None
        if self._gates:
            top_k = ids_TK.shape[1]
            logits_TE = weights_TK.numpy()[:, top_k:]
            weights_TK = weights_TK[:, :top_k].contiguous()
        rows = min(self._outages.rows(), len(ids_TK))
        # What the router chose, whatever becomes of it: placements follow what is wanted.
        self._dispatcher.routing.note(layer, ids_TK)
        if rows:
            ids, weights = ids_TK.numpy()[:rows], weights_TK.numpy()[:rows]
            most, over = self._overflow(layer, ids, weights)
            if self.settings.policy != "defer" and over.any():
                # The op may not change what it was given.
                ids_TK, weights_TK = ids_TK.clone(), weights_TK.clone()
                ids, weights = ids_TK.numpy()[:rows], weights_TK.numpy()[:rows]
                if logits_TE is None:
                    self._drop(layer, ids, weights, over, most)
                else:
                    self._reroute(layer, ids, weights, over, most, logits_TE[:rows])
        self._dispatcher(layer, x_TH, weights_TK, ids_TK, out_TH)

    def end_step(self) -> float:
        """Adapt the coefficient to the step that has ended; the share of its pairs that overflowed."""
        if not self._step_pairs:
            return 0.0
        share, full = self._step_over / self._step_pairs, load(self._step_rows, self.largest)
        self.stats.capacity_coefficient = adapt(self.settings, self.stats.capacity_coefficient, full, share)
        self._step_pairs = self._step_over = self._step_rows = 0
        return share

    def _overflow(self, layer: int, ids: np.ndarray, weights: np.ndarray) -> tuple[int, np.ndarray]:
        """How many rows an expert takes, and which pairs are over that; counted."""
        rows, top_k = ids.shape
        experts, coefficient = self._experts(layer), self.stats.capacity_coefficient
        most = capacity(
            self.settings, coefficient, rows=rows, top_k=top_k, experts=experts, largest=self.largest
        )
        over = overflow(ids, weights, most, experts)
        count = int(np.count_nonzero(over))
        self._step_rows = rows
        self._step_pairs += over.size
        self._step_over += count
        self.stats.capacity_pairs += over.size
        self.stats.overflow_pairs += count
        return most, over

    def _drop(self, layer: int, ids: np.ndarray, weights: np.ndarray, over: np.ndarray, most: int) -> None:
        ids[:], weights[:] = drop(ids, weights, over)
        self._dropped(layer, np.flatnonzero(over.any(axis=1)), most)

    def _reroute(
        self,
        layer: int,
        ids: np.ndarray,
        weights: np.ndarray,
        over: np.ndarray,
        most: int,
        logits: np.ndarray,
    ) -> None:
        gate, experts = self._gates[layer], self._experts(layer)
        rows = np.flatnonzero(over.any(axis=1))
        old, weights_before, logits = ids[rows], weights[rows], logits[rows, :experts]
        preferences = gate.preferences(logits)
        owners = self._dispatcher.peers.owners(layer)
        if not owners.complete:
            preferences[:, owners.array[:experts] == NOBODY] = NEVER
        room = most - np.bincount(ids[~over & (ids >= 0)], minlength=experts)
        new = next_choices(old, weights_before, over[rows], preferences, room)
        left_out = new < 0
        new = np.where(left_out, old, new)
        ids[rows], weights[rows] = drop(new, gate.reweigh(logits, weights_before, old, new), left_out)
        if left_out.any():
            self._dropped(layer, rows[left_out.any(axis=1)], most)
        rerouted = rows[(new != old).any(axis=1)]
        self.stats.overflow_rerouted_rows += len(rerouted)
        self._mark(layer, rerouted, most, "others went to the router's next choices")

    def _dropped(self, layer: int, rows: np.ndarray, most: int) -> None:
        self.stats.overflow_dropped_rows += len(rows)
        self._mark(layer, rows, most, "others' shares were left out")

    def _mark(self, layer: int, rows: np.ndarray, most: int, what: str) -> None:
        reason = f"capacity: an expert of layer {layer} takes {most} rows of this step, {what}"
        self._outages.note(Outage(layer, tuple(rows.tolist()), reason, degraded=True))

    def _experts(self, layer: int) -> int:
        return len(self._dispatcher.peers.route.replicas[layer])
