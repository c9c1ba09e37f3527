"""Dispatch and combine: one layer's rows out to the hosts, their sums back.

    1. look up which host answers each (row, expert) in the placement table of this step
    2. per host: its rows, with the ids of the experts it holds, into its connection's memory
    3. one header to every host, before the first answer is awaited
    4. combine: add the shares up in the table's order of hosts, so that the same rows give the same
       bits whichever host answers first

Shape suffixes: T = tokens of the step, K = top-k, H = hidden size, E = experts of the layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import structlog
import torch

from actors.buffers import Layout
from actors.link import HostLink
from actors.operands import check_operands
from actors.share import Share, combine, shares
from cluster.errors import HostError, ProtocolError
from cluster.frame import ITEM_BYTES, manifest_id
from cluster.messages import HostAddress
from cluster.table import PlacementTable

log = structlog.get_logger()

# Pause between attempts to reach a host that is restarting; short against its load time.
_RECONNECT_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Route:
    """What one step needs of the placement table: plain arrays, made once per epoch."""

    manifest: str
    epoch: int
    hosts: tuple[HostAddress, ...]
    host_of: Mapping[int, np.ndarray]
    """Per layer, int16 [E]: position in `hosts` of the host that answers for each expert."""


class Dispatcher:
    """Sends rows to the expert hosts and combines what comes back.

    `layout.max_rows` bounds one message; longer batches go in several rounds.
    """

    def __init__(
        self, route: Route, layout: Layout, *, node_id: str, model: str, key: bytes, deadline_s: float
    ) -> None:
        self.layout = layout
        self._max_rows = layout.max_rows
        self._row_bytes, self._pair_bytes = layout.hidden * ITEM_BYTES[layout.dtype], layout.top_k * 4
        self._checked: set[int] = set()
        self.deadline_s = deadline_s
        self.stats = DispatchStats()
        self._node_id, self._model, self._key = node_id, model, key
        self._links: dict[str, HostLink] = {}
        self.set_route(route)

    def set_route(self, route: Route) -> None:
        """Use another placement table from the next call on. Called between two steps."""
        links = {}
        for address in route.hosts:
            old = self._links.pop(address.host_id, None)
            if old is not None and old.address == address:
                links[address.host_id] = old
                continue
            if old is not None:
                old.close()
            links[address.host_id] = HostLink(
                address, self.layout, local=address.node_id == self._node_id, model=self._model, key=self._key
            )
        for gone in self._links.values():
            gone.close()
        self._links = links
        self._ordered = [links[address.host_id] for address in route.hosts]
        self._only = self._ordered[0] if len(self._ordered) == 1 else None
        manifest = manifest_id(route.manifest)
        for link in self._ordered:
            link.set_epoch(manifest, route.epoch)
        self._owners = {layer: (owners, owners.tolist()) for layer, owners in route.host_of.items()}
        self.route = route

    def connect(self, timeout_s: float) -> None:
        """Connect to every host, waiting for those that are still starting; HostError names the missing."""
        deadline = time.monotonic() + timeout_s
        for link in self._ordered:
            if not link.connected:
                self._reconnect(link, deadline)

    def ping(self, timeout_s: float) -> dict[str, float]:
        """Round-trip seconds per host id; raises if one does not answer."""
        return {link.address.host_id: link.ping(timeout_s) for link in self._ordered}

    def close(self) -> None:
        """Drop every connection."""
        for link in self._links.values():
            link.close()

    def __call__(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
    ) -> None:
        """Fill `out_TH` with the routed experts' weighted sum per row.

        Args: x and out [T, H] in the connection's dtype, weights [T, K] float32, ids [T, K] int32; all
        contiguous, since rows are copied as plain memory. Raises HostError if a host can't be reached
        within the deadline, or refuses; ValueError for tensors of other sizes, and, with a number of rows
        that was not seen before, of other types or layouts.
        """
        # Of all that a tensor can be asked, its bytes cost least: a quarter of a microsecond for the four.
        # Types and strides cost twice that, and follow from how the engine was compiled for that many rows.
        size, step = x_TH.nbytes, self._max_rows
        rows = size // self._row_bytes
        pairs = rows * self._pair_bytes
        if (
            rows * self._row_bytes != size
            or out_TH.nbytes != size
            or weights_TK.nbytes != pairs
            or ids_TK.nbytes != pairs
            or rows not in self._checked
        ):
            check_operands(self.layout, x_TH, weights_TK, ids_TK, out_TH)
            self._checked.add(rows)
        if rows > step:
            for start in range(0, rows, step):
                part = slice(start, start + step)
                self(layer, x_TH[part], weights_TK[part], ids_TK[part], out_TH[part])
            return
        started = perf_counter_ns()
        link = self._only
        if link is None:
            self._split(layer, x_TH, weights_TK, ids_TK, out_TH)
        else:
            # Every expert lives on one host: all rows go there as they are, one copy each way.
            addresses = x_TH.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(), out_TH.data_ptr()
            try:
                (link.exchanges.get((layer, rows)) or link.make_exchange(layer, rows))(*addresses)
            except (OSError, ProtocolError) as error:
                self._exchange_again(link, error, layer, rows, addresses)
        stats = self.stats
        stats.dispatches += 1
        stats.rows += rows
        stats.nanoseconds += perf_counter_ns() - started

    def _exchange_again(
        self, link: HostLink, error: Exception, layer: int, rows: int, addresses: tuple[int, int, int, int]
    ) -> None:
        """Hosts hold no request state, so the same rows may be sent any number of times."""
        deadline = time.monotonic() + self.deadline_s
        while True:
            self._lost(link, error)
            self._reconnect(link, deadline)
            try:
                return link.make_exchange(layer, rows)(*addresses)
            except (OSError, ProtocolError) as again:
                error = again

    def _split(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
    ) -> None:
        parts: list[Share] = []
        owners, owner_list = self._owners[layer]
        for part in shares(owners, owner_list, self._ordered, x_TH, weights_TK, ids_TK):
            # At once, so that a host works while the next one's share is made.
            self._send(layer, part)
            parts.append(part)
        for part in parts:
            self._receive(layer, part)
        combine(parts, out_TH)

    def _send(self, layer: int, part: Share) -> None:
        try:
            part.fill()
            part.link.send(layer, part.rows)
        except OSError:
            # Not connected, or the host is gone: `_receive` sends the same rows again.
            part.link.close()

    def _receive(self, layer: int, part: Share) -> None:
        """Wait for the answer to `part`; sends it again over a new connection if the host went away.

        Hosts hold no request state, so the same rows may be sent any number of times.
        """
        link, deadline = part.link, 0.0
        while True:
            try:
                link.receive()
                return
            except (OSError, ProtocolError) as error:
                self._lost(link, error)
            deadline = deadline or time.monotonic() + self.deadline_s
            self._reconnect(link, deadline)
            self._send(layer, part)

    def _lost(self, link: HostLink, error: Exception) -> None:
        log.warning("expert host lost, reconnecting", host=link.address.host_id, reason=str(error))
        self.stats.reconnects += 1
        link.close()

    def _reconnect(self, link: HostLink, deadline: float) -> None:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise HostError(
                    f"expert host {link.address.host_id} at {link.where} could not be reached",
                    "see `expertmesh status` and the host's log",
                )
            try:
                link.connect(min(remaining, self.deadline_s))
                link.set_deadline(self.deadline_s)
                return
            except OSError:
                time.sleep(min(_RECONNECT_PAUSE_S, max(remaining, 0)))


class DispatchStats:
    """Counters of one engine process, read by its metrics; plain integers, one writer."""

    def __init__(self) -> None:
        self.dispatches = 0
        self.rows = 0
        self.nanoseconds = 0
        self.reconnects = 0


def fixed_route(
    manifest: str, epoch: int, hosts: Sequence[HostAddress], owners: Mapping[int, Sequence[int]]
) -> Route:
    """A route from plain lists: `owners[layer][expert]` is the position in `hosts`."""
    return Route(manifest, epoch, tuple(hosts), {k: np.asarray(v, np.int16) for k, v in owners.items()})


def route_from_table(table: PlacementTable) -> Route:
    """The arrays of one table: each expert is answered for by the first of its hosts that runs."""
    owners = {layer: table.host_matrix(layer) for layer in table.experts}
    missing = [
        (layer, expert) for layer, hosts in owners.items() for expert, host in enumerate(hosts) if host < 0
    ]
    if missing:
        raise HostError(
            f"{len(missing)} experts have no running host, the first is "
            f"layer {missing[0][0]}, expert {missing[0][1]}",
            "see `expertmesh status`",
        )
    return fixed_route(table.manifest, table.epoch, table.running, owners)
