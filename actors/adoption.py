"""A host that serves comes to hold other experts: layer by layer, beside what it holds, while it goes on computing.

What is new is read at a limited pace, so that the cores and the disk stay those of the requests, into slots that are
free; on a GPU, where slots cost memory, into a new layer beside the old one. Then one assignment puts the new layer in
the old one's place: the next dispatch finds it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

import structlog

from actors.expert_kernels import VllmCpuLayer
from actors.expert_maths import layer_maths
from actors.expert_reader import ReadVariant, open_layer
from actors.expert_weights import free, rebuilt_layer
from actors.hosted_layer import HostedLayer
from cluster import niceness
from cluster.checkpoint import Checkpoint
from cluster.errors import ExpertmeshError
from cluster.holdings import Holdings, digest
from cluster.messages import HostHolds

log = structlog.get_logger()

Build = Callable[[Checkpoint, int, tuple[int, ...]], HostedLayer]

# How long a pause for the pace may be at once.
_LONGEST_PAUSE_S: Final = 1.0
# From when nobody is to ask for an expert any more until its memory is given back.
_GRACE_S: Final = 0.1


class Adoption:
    """Changes `layers` in place; `held` is what they hold now."""

    def __init__(
        self,
        layers: dict[int, HostedLayer],
        held: Holdings,
        opened: Callable[[], AbstractContextManager[Checkpoint]],
        build: Build,
        variant: ReadVariant | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`opened` gives the checkpoint for a block; `build` makes a layer of which the host holds nothing; `variant`
        reads experts that are not the checkpoint's.
        """
        self._layers, self._opened, self._build, self._sleep = layers, opened, build, sleep
        self._variant = variant
        self._change = threading.Condition()
        self._held = {layer: tuple(experts) for layer, experts in held.items() if experts}
        self._wanted: tuple[dict[int, tuple[int, ...]], int, int] | None = None
        self._working = False
        self._failed, self._error = 0, ""

    def ask(self, experts: Holdings, number: int, bandwidth: int) -> None:
        """Hold these experts from now on; returns at once. What was asked for before is forgotten."""
        wanted = {layer: tuple(sorted(ids)) for layer, ids in sorted(experts.items()) if ids}
        with self._change:
            self._wanted = wanted, number, bandwidth
            self._failed, self._error = 0, ""
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="expertmesh-adopt", daemon=True).start()

    def state(self) -> HostHolds:
        """What is held, and what it is changing to."""
        with self._change:
            adopting = digest(self._wanted[0]) if self._wanted is not None else ""
            weights = sum(layer.weight_bytes for layer in list(self._layers.values()))
            return HostHolds(digest(self._held), weights, adopting, self._failed, self._error)

    @property
    def count(self) -> int:
        """Number of experts that are held."""
        return sum(map(len, self._held.values()))

    def _work(self) -> None:
        if not self._held:
            # Nobody asks this host for anything yet. One that serves must not do so: its other threads wait for the
            # interpreter's lock, which a nice thread would keep for longer.
            niceness.yield_cores()
        while True:
            with self._change:
                if self._wanted is None or self._wanted[0] == self._held:
                    self._wanted, self._working = None, False
                    return
                asked = wanted, number, bandwidth = self._wanted
            try:
                self._change_to(wanted, bandwidth)
            except Exception as error:
                said = (
                    error.message
                    if isinstance(error, ExpertmeshError)
                    else f"{type(error).__name__}: {error}"
                )
                log.warning("experts not loaded", reason=said)
                with self._change:
                    if self._wanted is asked:
                        self._wanted, self._failed, self._error = None, number, said

    def _change_to(self, wanted: dict[int, tuple[int, ...]], bandwidth: int) -> None:
        # First what needs no files: it makes room.
        for layer in [layer for layer in self._held if set(wanted.get(layer, ())) < set(self._held[layer])]:
            self._put(layer, wanted.get(layer, ()), None, bandwidth)
        changed = [layer for layer, experts in wanted.items() if self._held.get(layer) != experts]
        if not changed:
            return
        with self._opened() as checkpoint:
            for layer in changed:
                if self._wanted is None or self._wanted[0] is not wanted:
                    return  # something else was asked for
                self._put(layer, wanted[layer], checkpoint, bandwidth)

    def _put(
        self, layer: int, experts: tuple[int, ...], checkpoint: Checkpoint | None, bandwidth: int
    ) -> None:
        old = self._layers.get(layer)
        if not experts:
            self._layers.pop(layer, None)
        elif old is None:
            assert checkpoint is not None
            self._layers[layer] = self._build(checkpoint, layer, experts)
            self._pause(self._layers[layer].weight_bytes, bandwidth)
        elif old.experts.roomy and old.experts.room >= len(experts):
            self._put_in_place(layer, old, experts, checkpoint, bandwidth)
        elif checkpoint is None:
            made = rebuilt_layer(old.experts, old.slots, experts, None)
            self._layers[layer] = HostedLayer(made, experts, old.num_experts)
        else:
            with open_layer(checkpoint, layer, layer_maths(checkpoint, layer), self._variant) as read:
                made = rebuilt_layer(
                    old.experts, old.slots, experts, read, lambda size: self._pause(size, bandwidth)
                )
            self._layers[layer] = HostedLayer(made, experts, old.num_experts)
        with self._change:
            self._held = {key: value for key, value in self._held.items() if key != layer}
            if experts:
                self._held[layer] = experts

    def _put_in_place(
        self,
        layer: int,
        old: HostedLayer,
        experts: tuple[int, ...],
        checkpoint: Checkpoint | None,
        bandwidth: int,
    ) -> None:
        """New experts into free slots, beside those that compute; the slots of others given back."""
        kept = {expert: slot for expert, slot in old.slots.items() if expert in experts}
        new = [expert for expert in experts if expert not in kept]
        loaded = old.experts
        if new:
            assert checkpoint is not None
            taken = set(old.slots.values())
            free_slots = (slot for slot in range(loaded.room) if slot not in taken)
            size = loaded.weight_bytes // loaded.room
            with open_layer(checkpoint, layer, layer_maths(checkpoint, layer), self._variant) as read:
                for expert, slot in zip(new, free_slots, strict=False):
                    loaded.put(slot, read(expert))
                    kept[expert] = slot
                    self._pause(size, bandwidth)
            if isinstance(loaded, VllmCpuLayer):
                loaded.loaded()
        self._layers[layer] = HostedLayer(loaded, kept, old.num_experts)
        gone = set(old.slots.values()) - set(kept.values())
        if gone:
            # A thread may just have looked the old layer up.
            self._sleep(_GRACE_S)
            free(loaded, gone)

    def _pause(self, size: int, bandwidth: int) -> None:
        if bandwidth:
            self._sleep(min(size / bandwidth, _LONGEST_PAUSE_S))
