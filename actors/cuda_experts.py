"""The experts of an engine on a GPU: those of hosts on the same GPU are mapped into it, the others are asked for.

Tokens do not travel to an expert on the same GPU: its memory is mapped here and the engine's own stream computes with
it, inside the graph. The host remains who loads, verifies, versions and frees it, and may die or be replaced: what is
mapped stays valid until this engine lets it go, between two steps.

    layer's op:  post (what is elsewhere, off to it) → experts at hand → collect (what has come, added)

Elsewhere are hosts on other GPUs of the machine (`actors.gpu_neighbours`), and those that the dispatcher asks.

Shape suffixes as in `actors.dispatch`; E = experts of the layer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import structlog
import torch

from actors.buffers import Layout
from actors.cuda_exchange import Compute, Exchange
from actors.cuda_memory import CudaSlots, gpu_name
from actors.gpu_neighbours import GpuNeighbours
from actors.lenders import Lenders, Source
from actors.route import Route
from actors.slot_format import SlotFormat, SlotTensors, run_experts, skipping
from cluster.errors import HostError

log = structlog.get_logger()

# A layer's rows are back within a fraction of a millisecond when they are few, and within some when they are thousands.
NEAR_DEADLINE_S = 0.25


class _Move(NamedTuple):
    """An expert that is to be had from one of these hosts, or from none."""

    layer: int
    expert: int
    sources: tuple[Source, ...]


class _Layer:
    """One layer's places: one per expert, and a last one.

    Those that no host's memory is mapped to are zeros, which cost one slot for all layers together: a kernel may read
    any of them.
    """

    def __init__(self, experts: int, form: SlotFormat, device: torch.device, zeros: CudaSlots) -> None:
        self.form, self.nothing, self.zeros = form, experts, zeros
        self.slots = CudaSlots(device.index or 0, experts + 1, form.size)
        for place in range(experts + 1):
            self.slots.alias(place, zeros, 0)
        # As many as experts, so that vLLM finds the tile sizes that were tuned for that number.
        self.tensors: SlotTensors = form.tensors(self.slots.bytes()[:experts])
        self.sources: dict[int, Source] = {}
        self.skipping_E = skipping(experts, device)

    @property
    def whole(self) -> bool:
        """Whether every expert is here."""
        return len(self.sources) == self.nothing


class CudaExperts:
    """Computes layers on one GPU. Everything but calls of the object happens between two steps."""

    def __init__(
        self,
        layout: Layout,
        experts: Mapping[int, int],
        *,
        device: torch.device,
        model: str,
        key: bytes,
        deadline_s: float,
        near_deadline_s: float | None = None,
    ) -> None:
        """`experts`: how many each layer has; `deadline_s`: the longest wait for what is dispatched;
        `near_deadline_s`: that for hosts on other GPUs of the machine, None if there can't be any.
        """
        if layout.dtype not in ("bfloat16", "float32"):
            raise HostError(
                f"engines on GPUs compute in bfloat16 or float32, not {layout.dtype}", "set model.dtype"
            )
        self._device, self._number = device, device.index or 0
        self.exchange = Exchange(layout, self._number, deadline_s, near_deadline_s=near_deadline_s)
        self._experts = dict(experts)
        self._layers: dict[int, _Layer] = {}
        # Of experts of one size each.
        self._zeros: dict[int, CudaSlots] = {}
        self._has_neighbours = near_deadline_s is not None
        gpu = gpu_name(self._number)
        self._lenders = Lenders(gpu, tuple(experts), model=model, key=key)
        self._neighbours = GpuNeighbours(self.exchange, layout, self._number, gpu, model=model, key=key)
        # Layer → per expert the hosts on this machine that have it, the one to ask first in front.
        self._near_hosts: dict[int, list[tuple[Source, ...]]] = {}
        self._moves: deque[_Move] = deque()
        # Kept for good: graphs hold their addresses.
        self._place = {
            layer: torch.full((count,), -1, dtype=torch.int32, device=device)
            for layer, count in experts.items()
        }
        self._near = {layer: place.clone() for layer, place in self._place.items()}
        # Layers of which neighbours compute a part.
        self._shared: set[int] = set()
        self.counts = {
            layer: torch.zeros(count, dtype=torch.int64, device=device) for layer, count in experts.items()
        }

    def __call__(
        self, layer: int, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' weighted sums [T, H]. Stream-ordered: may be captured in a graph."""
        mapped = self._layers.get(layer)
        nothing = self._experts[layer]
        places, local = self.exchange.post(
            layer,
            x_TH,
            weights_TK,
            ids_TK,
            self._place[layer],
            self._near[layer],
            self.counts[layer],
            nothing,
        )
        if mapped is None:
            y_TH = torch.zeros_like(x_TH)
        else:
            # A graph keeps what it was captured with; if experts go afterwards, their pairs are multiplied by zeros.
            skip = None if mapped.whole and layer not in self._shared else mapped.skipping_E
            y_TH = run_experts(mapped.tensors, mapped.form.activation, x_TH, places, local, skip)
        self.exchange.collect(y_TH)
        return y_TH

    def dispatch_to(self, compute: Compute) -> None:
        """What computes experts that are not mapped."""
        self.exchange.serve(compute)

    def use(self, route: Route, node_id: str, patience_s: float) -> None:
        """Have experts from the route's hosts on this machine's GPUs from now on, see `settle`.

        Of replicas on this GPU and on others the first is used. What is mapped of an expert that is nowhere else stays.
        A host that does not answer for `patience_s` lends nothing until the next route: its experts are dispatched.
        """
        torch.cuda.synchronize(self._device)
        near = {
            position: address for position, address in enumerate(route.hosts) if address.node_id == node_id
        }
        self._lenders.begin(list(near.values()), patience_s)
        self._neighbours.begin(list(near.values()) if self._has_neighbours else [])
        self._moves.clear()
        for layer, replicas in route.replicas.items():
            place = self._layers.get(layer)
            here = [
                tuple(Source.of(near[host]) for host in hosts if host in near)
                for hosts in replicas[: self._experts[layer]]
            ]
            self._near_hosts[layer] = here
            self._show(layer)
            for expert, hosts in enumerate(replicas[: self._experts[layer]]):
                sources = [source for source in here[expert] if self._lenders.may_lend(source)]
                now = place.sources.get(expert) if place is not None else None
                if hosts and (now not in sources if sources else now is not None):
                    self._moves.append(_Move(layer, expert, tuple(sources)))

    def settle(self, seconds: float = float("inf")) -> int:
        """Map what `use` asked for, let go what was mapped in its place, and use hosts on other GPUs that have become
        ready; how many experts and hosts are left.

        For about so long, and one at least. Waits for the GPU first, then for the hosts.
        """
        self.look()
        if self._moves:
            torch.cuda.synchronize(self._device)
            until, touched = time.monotonic() + seconds, set()
            while self._moves:
                move = self._moves.popleft()
                self._make_move(move)
                touched.add(move.layer)
                if time.monotonic() >= until:
                    break
            for layer in touched:
                self._show(layer)
        if not self._moves:
            self._lenders.end()
            # Without an end to the time all shall be ready; else their turn comes in another call.
            while self._neighbours.pending and seconds == float("inf"):
                self._neighbours.wait(seconds)
                self.look()
        return self.left

    def look(self) -> None:
        """Between two steps, now and then: ask neighbours no more that did not answer in time, or ask them again."""
        torch.cuda.synchronize(self._device)
        if self._neighbours.look():
            for layer in self._near_hosts:
                self._show(layer)

    @property
    def left(self) -> int:
        """How many experts are to be taken over, and hosts on other GPUs not ready yet."""
        return len(self._moves) + self._neighbours.pending

    def close(self) -> None:
        """Compute no more."""
        torch.cuda.synchronize(self._device)
        self.exchange.close()
        self._neighbours.close()

    def take_counts(self) -> dict[int, tuple[int, ...]]:
        """How often each layer's experts were chosen since the last call; waits for the GPU."""
        chosen = {layer: tuple(counts.tolist()) for layer, counts in self.counts.items()}
        for counts in self.counts.values():
            counts.zero_()
        return chosen

    @property
    def mapped(self) -> dict[str, int]:
        """How many experts are whose."""
        owners = [source.host_id for layer in self._layers.values() for source in layer.sources.values()]
        return {owner: owners.count(owner) for owner in sorted(set(owners))}

    @property
    def asked(self) -> dict[str, int]:
        """For how many experts each host on another GPU is asked."""
        names = {
            self._neighbours.number(source): source.host_id
            for hosts in self._near_hosts.values()
            for sources in hosts
            for source in sources
        }
        numbers = [number for near in self._near.values() for number in near.tolist() if number >= 0]
        return {names[number]: numbers.count(number) for number in sorted(set(numbers))}

    def _make_move(self, move: _Move) -> None:
        layer, expert, sources = move
        if any(self._borrow(layer, expert, source) for source in sources):
            return
        place = self._layers.get(layer)
        if place is not None and place.sources.pop(expert, None) is not None:
            place.slots.alias(expert, place.zeros, 0)

    def _borrow(self, layer: int, expert: int, source: Source) -> bool:
        form = self._lenders.form(source, layer)
        if form is None:
            return False
        place = self._layers.get(layer)
        if place is None:
            place = self._layers[layer] = self._make(layer, form)
        if form != place.form:
            log.warning(
                "host keeps experts in another format", host=source.host_id, layer=layer, **asdict(form)
            )
            return False
        descriptor = self._lenders.borrow(source, layer, expert)
        if descriptor < 0:
            return False
        place.slots.attach(expert, descriptor)
        place.sources[expert] = source
        return True

    def _make(self, layer: int, form: SlotFormat) -> _Layer:
        zeros = self._zeros.get(form.size)
        if zeros is None:
            zeros = self._zeros[form.size] = CudaSlots(self._number, 1, form.size)
            zeros.take(0)
            zeros.bytes().zero_()
        return _Layer(self._experts[layer], form, self._device, zeros)

    def _show(self, layer: int) -> None:
        """Write where the layer's experts are to the device."""
        place = self._layers.get(layer)
        places = [
            expert if place is not None and expert in place.sources else -1
            for expert in range(self._experts[layer])
        ]
        self._place[layer].copy_(torch.tensor(places, dtype=torch.int32))
        near = [
            self._neighbour(places[expert], hosts) for expert, hosts in enumerate(self._near_hosts[layer])
        ]
        self._near[layer].copy_(torch.tensor(near, dtype=torch.int32))
        (self._shared.add if max(near) >= 0 else self._shared.discard)(layer)

    def _neighbour(self, place: int, hosts: tuple[Source, ...]) -> int:
        """Whom to ask for an expert that these have; -1 if it is computed here, or dispatched."""
        for source in hosts:
            if (number := self._neighbours.number(source)) is not None:
                return number
            if place >= 0 and self._lenders.may_lend(source):
                return -1
        return -1
