"""The experts of an engine on a GPU: those of hosts on the same GPU are mapped into it, the others are dispatched to.

Tokens do not travel to an expert on the same GPU: its memory is mapped here and the engine's own stream computes with
it, inside the graph. The host remains who loads, verifies, versions and frees it, and may die or be replaced: what is
mapped stays valid until this engine lets it go, between two steps.

    layer's op:  post (what is elsewhere, off to the dispatcher) → experts at hand → collect (what has come, added)

Shape suffixes as in `actors.dispatch`; E = experts of the layer.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

import structlog
import torch

from actors import json_stream
from actors.buffers import Layout
from actors.cuda_exchange import Compute, Exchange
from actors.cuda_memory import CudaSlots, gpu_name
from actors.handshake import dial_to_copy
from actors.route import Route
from actors.slot_format import SlotFormat, SlotTensors, run_experts, skipping
from actors.streams import open_stream
from cluster.errors import HostError, ProtocolError
from cluster.messages import HostAddress

log = structlog.get_logger()

_ASK_S = 30.0


class _Source(NamedTuple):
    """Whose memory an expert's place has."""

    host_id: str
    pid: int


class _Lender(NamedTuple):
    """A host on this GPU that can be asked for memory."""

    source: _Source
    sock: socket.socket
    forms: dict[int, SlotFormat]
    """By layer."""


class _Move(NamedTuple):
    """An expert that is to be had from one of these hosts, or from none."""

    layer: int
    expert: int
    lenders: tuple[_Lender, ...]


class _Layer:
    """One layer's places: one per expert, and a last one.

    Those that no host's memory is mapped to are zeros, which cost one slot for all layers together: a kernel may read
    any of them.
    """

    def __init__(self, experts: int, form: SlotFormat, device: int, zeros: CudaSlots) -> None:
        self.form, self.nothing, self.zeros = form, experts, zeros
        self.slots = CudaSlots(device, experts + 1, form.size)
        for place in range(experts + 1):
            self.slots.alias(place, zeros, 0)
        # As many as experts, so that vLLM finds the tile sizes that were tuned for that number.
        self.tensors: SlotTensors = form.tensors(self.slots.bytes()[:experts])
        self.sources: dict[int, _Source] = {}
        self.skipping_E = skipping(experts, torch.device("cuda", device))

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
        device: int,
        model: str,
        key: bytes,
        deadline_s: float,
    ) -> None:
        """`experts`: how many each layer has; `deadline_s`: the longest wait for what is elsewhere."""
        if layout.dtype not in ("bfloat16", "float32"):
            raise HostError(
                f"engines on GPUs compute in bfloat16 or float32, not {layout.dtype}", "set model.dtype"
            )
        self._model, self._key, self._device = model, key, device
        self.exchange = Exchange(layout, device, deadline_s)
        self._experts = dict(experts)
        self._layers: dict[int, _Layer] = {}
        self._zeros: CudaSlots | None = None
        self._lenders: dict[str, _Lender] = {}
        self._moves: deque[_Move] = deque()
        where = torch.device("cuda", device)
        # Kept for good: graphs hold their addresses.
        self._place = {
            layer: torch.full((count,), -1, dtype=torch.int32, device=where)
            for layer, count in experts.items()
        }
        self.counts = {
            layer: torch.zeros(count, dtype=torch.int64, device=where) for layer, count in experts.items()
        }

    def __call__(
        self, layer: int, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' weighted sums [T, H]. Stream-ordered: may be captured in a graph."""
        mapped = self._layers.get(layer)
        nothing = self._experts[layer]
        places, local = self.exchange.post(
            layer, x_TH, weights_TK, ids_TK, self._place[layer], self.counts[layer], nothing
        )
        if mapped is None:
            y_TH = torch.zeros_like(x_TH)
        else:
            # A graph keeps what it was captured with; if experts go afterwards, their pairs are multiplied by zeros.
            skip = None if mapped.whole else mapped.skipping_E
            y_TH = run_experts(mapped.tensors, mapped.form.activation, x_TH, places, local, skip)
        self.exchange.collect(y_TH, nothing)
        return y_TH

    def dispatch_to(self, compute: Compute) -> None:
        """What computes experts that are not mapped."""
        self.exchange.serve(compute)

    def use(self, route: Route, node_id: str) -> None:
        """Have experts from the route's hosts on this GPU from now on, see `settle`.

        What is mapped of an expert that is nowhere else stays. A host that can't be asked lends nothing: its experts
        are dispatched.
        """
        for old in self._lenders.values():
            old.sock.close()
        asked = {
            position: self._ask(address)
            for position, address in enumerate(route.hosts)
            if address.node_id == node_id
        }
        lenders = {position: lender for position, lender in asked.items() if lender is not None}
        self._lenders = {lender.source.host_id: lender for lender in lenders.values()}
        self._moves = deque(
            _Move(layer, expert, tuple(lenders[host] for host in hosts if host in lenders))
            for layer, replicas in route.replicas.items()
            for expert, hosts in enumerate(replicas[: self._experts[layer]])
            if hosts
            and not self._settled(layer, expert, [lenders[host] for host in hosts if host in lenders])
        )

    def settle(self, seconds: float = float("inf")) -> int:
        """Map what `use` asked for and let go what was mapped in its place, for about so long; how many are left.

        Waits for the GPU first, then for the hosts.
        """
        if not self._moves:
            return 0
        torch.cuda.synchronize(self._device)
        until, touched = time.monotonic() + seconds, set()
        while self._moves and time.monotonic() < until:
            move = self._moves.popleft()
            self._make_move(move)
            touched.add(move.layer)
        for layer in touched:
            self._show(layer)
        if not self._moves:
            for lender in self._lenders.values():
                lender.sock.close()
            self._lenders = {}
        return len(self._moves)

    @property
    def left(self) -> int:
        """How many experts are to be taken over."""
        return len(self._moves)

    def close(self) -> None:
        """Compute no more."""
        torch.cuda.synchronize(self._device)
        self.exchange.close()

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

    def _ask(self, address: HostAddress) -> _Lender | None:
        """A connection to a host that lends memory of this GPU, and how it keeps each layer's experts."""
        try:
            sock = open_stream(address, True, _ASK_S)
        except OSError as error:
            log.warning("host lends nothing", host=address.host_id, reason=str(error))
            return None
        try:
            sock.settimeout(_ASK_S)
            dial_to_copy(sock, self._key, self._model)
            forms: dict[int, SlotFormat] = {}
            for layer in self._experts:
                json_stream.send(sock, {"ask": "memory", "layer": layer, "gpu": gpu_name(self._device)})
                with suppress(json_stream.RefusedError):
                    forms[layer] = SlotFormat(**json_stream.receive(sock)[0]["format"])
            if forms:
                return _Lender(_Source(address.host_id, address.pid), sock, forms)
        except (OSError, ProtocolError) as error:
            log.warning("host lends nothing", host=address.host_id, reason=str(error))
        sock.close()
        return None

    def _settled(self, layer: int, expert: int, lenders: Sequence[_Lender]) -> bool:
        """Whether an expert is where it should be: with one of these hosts, or nowhere here if there is none."""
        place = self._layers.get(layer)
        now = place.sources.get(expert) if place is not None else None
        return now in [lender.source for lender in lenders] if lenders else now is None

    def _make_move(self, move: _Move) -> None:
        layer, expert, lenders = move
        if any(layer in lender.forms and self._borrow(layer, expert, lender) for lender in lenders):
            return
        place = self._layers.get(layer)
        if place is not None and place.sources.pop(expert, None) is not None:
            place.slots.alias(expert, place.zeros, 0)

    def _borrow(self, layer: int, expert: int, lender: _Lender) -> bool:
        place, form, host = self._layers.get(layer), lender.forms[layer], lender.source.host_id
        if place is None:
            place = self._layers[layer] = self._make(layer, form)
        if form != place.form:
            log.warning("host keeps experts in another format", host=host, layer=layer, format=asdict(form))
            return False
        question = {"ask": "memory", "layer": layer, "expert": expert, "gpu": gpu_name(self._device)}
        try:
            json_stream.send(lender.sock, question)
            _, descriptor = json_stream.receive(lender.sock)
        except (OSError, ProtocolError) as error:
            log.warning("expert not lent", host=host, layer=layer, expert=expert, reason=str(error))
            return False
        place.slots.attach(expert, descriptor)
        place.sources[expert] = lender.source
        return True

    def _make(self, layer: int, form: SlotFormat) -> _Layer:
        if self._zeros is None:
            self._zeros = CudaSlots(self._device, 1, form.size)
            self._zeros.take(0)
            self._zeros.bytes().zero_()
        return _Layer(self._experts[layer], form, self._device, self._zeros)

    def _show(self, layer: int) -> None:
        """Write where the layer's experts are to the device."""
        place = self._layers.get(layer)
        places = [
            expert if place is not None and expert in place.sources else -1
            for expert in range(self._experts[layer])
        ]
        self._place[layer].copy_(torch.tensor(places, dtype=torch.int32))


def _of(address: HostAddress) -> _Source:
    return _Source(address.host_id, address.pid)
