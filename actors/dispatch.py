"""Dispatch and combine: one layer's rows out to the hosts, their sums back.

    1. look up who owns each (row, expert): the placement table of this step, less the hosts that are out
    2. per host: its rows, with the ids of the experts it owns, into its connection's memory
    3. one header to every host, before the first answer is awaited
    4. combine: add the shares up in the table's order of hosts, so that the same rows give the same
       bits whichever host answers first
    5. only if a host is gone or late: `actors.rescue` asks the replicas for its rows

Shape suffixes: T = tokens of the step, K = top-k, H = hidden size, E = experts of the layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter_ns

import numpy as np
import torch

from actors.buffers import Layout
from actors.link import FAILURES, HostLink, LateError
from actors.operands import check_operands
from actors.peers import KeepOff, Peers
from actors.rescue import Operands, Outage, Rescue
from actors.route import NOBODY, Route, owners
from actors.routing_counts import RoutingCounts
from actors.row_versions import RowVersions
from actors.share import Share, combine, shares
from cluster.errors import HostError
from cluster.frame import ITEM_BYTES
from cluster.live_versions import all_added
from cluster.messages import DispatchSample, HostWork, Traffic

# One step in so many is timed, all its layers; so many dispatches are kept until somebody asks.
_SAMPLED, _SAMPLES = 8, 1024


def _raise_outage(outage: Outage) -> None:
    raise HostError(outage.reason, "see `expertmesh status`")


class Dispatcher:
    """Sends rows to the expert hosts and combines what comes back.

    `layout.max_rows` bounds one message; longer batches go in several rounds. `deadline_s` is the longest wait
    for an answer that nobody else can give, `min_deadline_s` the shortest after which a late host's rows are sent
    to another replica. `on_outage` is told of rows that nobody could answer for; the default raises HostError.
    `keep_off` is told who owns what whenever that changes, and says whether the router now keeps off experts that
    have no owner: rows count as degraded meanwhile.
    """

    def __init__(
        self,
        route: Route,
        layout: Layout,
        *,
        node_id: str,
        model: str,
        key: bytes,
        deadline_s: float,
        min_deadline_s: float = 0.01,
        drop: bool = False,
        on_outage: Callable[[Outage], None] = _raise_outage,
        keep_off: KeepOff | None = None,
        spare_experts: int = 0,
    ) -> None:
        self.layout = layout
        self._max_rows = layout.max_rows
        self._row_bytes, self._pair_bytes = layout.hidden * ITEM_BYTES[layout.dtype], layout.top_k * 4
        self._checked: set[int] = set()
        self.peers = Peers(
            route,
            layout,
            node_id=node_id,
            model=model,
            key=key,
            deadline_s=deadline_s,
            min_deadline_s=min_deadline_s,
            keep_off=keep_off,
        )
        self.stats = self.peers.stats
        self.routing = RoutingCounts(route.sizes, spare_experts)
        self.counts_routing = True
        """Whether rows come with the experts that the router chose; else whoever changed them counts what it chose."""
        self._samples: deque[DispatchSample] = deque(maxlen=_SAMPLES)
        self._taken = 0
        self._first, self._step = min(route.replicas, default=0), 0
        self.versions: RowVersions | None = None
        """Where rows may be of versions that have experts of their own."""
        self._on_outage = on_outage
        self._rescue = Rescue(self, drop=drop, on_outage=on_outage)

    def __call__(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
        first_row: int = 0,
        chosen_TK: torch.Tensor | None = None,
    ) -> None:
        """Fill `out_TH` with the routed experts' weighted sum per row.

        Args: x and out [T, H] in the connection's dtype, weights [T, K] float32, ids [T, K] int32; all
        contiguous, since rows are copied as plain memory. `first_row` is what an outage adds to its row numbers, and
        `chosen_TK` what the router chose, where `ids_TK` are the numbers of the rows' versions for it already.
        ValueError for tensors of other sizes, and, with a number of rows that was not seen before, of other types
        or layouts.
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
        if chosen_TK is None:
            chosen_TK = ids_TK
            if self.versions is not None:
                ids_TK = self.versions.numbers(layer, ids_TK)
        if rows > step:
            for start in range(0, rows, step):
                part = slice(start, start + step)
                x, weights, out = x_TH[part], weights_TK[part], out_TH[part]
                self(layer, x, weights, ids_TK[part], out, first_row + start, chosen_TK[part])
            return
        started = perf_counter_ns()
        peers = self.peers
        if peers.unsettled:
            peers.catch_up()
        link, done = peers.only, None
        if link is None:
            done = self._spread(layer, x_TH, weights_TK, ids_TK, out_TH, first_row)
        else:
            # One host holds every expert: all rows go there as they are, one copy each way.
            addresses = x_TH.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(), out_TH.data_ptr()
            try:
                (link.exchanges.get((layer, rows)) or link.make_exchange(layer, rows))(*addresses)
            except FAILURES as error:
                self._fail(link, error)
                operands = Operands(layer, x_TH, weights_TK, ids_TK, out_TH, first_row)
                refusing = self.peers.asked if isinstance(error, HostError) else frozenset()
                self._rescue(operands, [], [], refusing, error)
        stats = self.stats
        if peers.keeps_off:
            stats.degraded_rows += rows
            reason = "some experts have no living host; the router chose among the others"
            self._on_outage(Outage(layer, tuple(range(first_row, first_row + rows)), reason, degraded=True))
        stats.dispatches += 1
        stats.rows += rows
        elapsed = perf_counter_ns() - started
        stats.nanoseconds += elapsed
        if elapsed > stats.slowest_ns:
            stats.slowest_ns = elapsed
        if layer == self._first:
            self._step += 1
        if not self._step % _SAMPLED:
            self._sample(link, done, ids_TK, rows, elapsed)
        if self.counts_routing:
            self.routing.note(layer, chosen_TK)

    def take_traffic(self) -> Traffic:
        """What was counted since the last call; between two steps."""
        before, self._taken = self._taken, self.stats.dispatches
        samples = tuple(self._samples)
        self._samples.clear()
        return Traffic(self._taken - before, self.routing.take(all_added(self.peers.route.versions)), samples)

    def _sample(
        self, only: HostLink | None, done: list[Share] | None, ids_TK: torch.Tensor, rows: int, elapsed: int
    ) -> None:
        """Keep how long this dispatch took, and whose work it was."""
        if only is not None:
            work = HostWork(
                only.address.host_id, rows, ids_TK.numel(), len(ids_TK.unique()), only.compute_ns / 1e9
            )
            self._samples.append(DispatchSample((work,), elapsed / 1e9, self._step))
        elif done:
            works = tuple(
                HostWork(part.link.address.host_id, part.rows, *part.work(), part.link.compute_ns / 1e9)
                for part in done
            )
            self._samples.append(DispatchSample(works, elapsed / 1e9, self._step))
            self.peers.learn(works)

    def _spread(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
        first_row: int,
    ) -> list[Share] | None:
        """Ask every host for its share; the shares, if all came in time and every expert has an owner."""
        peers = self.peers
        of_layer, hosts_P = peers.assigned(layer, ids_TK)
        sent: list[Share] = []
        error: Exception | None = None
        for part in shares(of_layer, peers.links, x_TH, weights_TK, ids_TK, hosts_P):
            # At once, so that a host works while the next one's share is made.
            failed = self.send(layer, part)
            if failed is None:
                sent.append(part)
            error = failed or error
        done: list[Share] = []
        late: list[Share] = []
        refusing: set[int] = set()
        for part in sent:
            failed = self.receive(part, hedged=True)
            if isinstance(failed, LateError) and not self._hedge(layer, ids_TK, part):
                # Nobody else has all that it was asked for.
                failed = self.receive(part, hedged=False)
            if failed is None:
                done.append(part)
            elif isinstance(failed, LateError):
                late.append(part)
            elif isinstance(failed, HostError):
                refusing.add(part.position)
            error = failed or error
        if error is None and of_layer.complete:
            combine(done, out_TH)
            return done
        operands = Operands(layer, x_TH, weights_TK, ids_TK, out_TH, first_row)
        self._rescue(operands, done, late, refusing, error)
        return None

    def send(self, layer: int, part: Share) -> Exception | None:
        """Send a share; what went wrong, after the host was put out for it."""
        try:
            part.fill()
            part.link.send(layer, part.rows)
        except OSError as error:
            gone = ConnectionError(f"expert host {part.link.address.host_id}: {error.strerror or error}")
            self._fail(part.link, gone)
            return gone
        return None

    def receive(self, part: Share, *, hedged: bool) -> Exception | None:
        """Wait for a share's answer; what went wrong, after the host was marked for it.

        With `hedged` the wait is the host's own deadline, and a LateError leaves the answer owed and the host
        unmarked.
        """
        peers, link = self.peers, part.link
        try:
            link.set_deadline(peers.deadline(part) if hedged else peers.deadline_s)
            link.receive()
        except LateError as error:
            if not hedged:
                peers.lost(link.address.host_id, error)
            return error
        except FAILURES as error:
            self._fail(link, error)
            return error
        peers.answered(part, link.sent_ns)
        return None

    def _hedge(self, layer: int, ids_TK: torch.Tensor, part: Share) -> bool:
        """Whether others can be asked in place of a host whose answer is late; it is then marked as late."""
        elsewhere = owners(self.peers.route.replicas[layer], self.peers.asked - {part.position}, ())
        if not elsewhere.complete:
            covered = part.covers()
            wanted = np.where(covered, ids_TK.numpy(), NOBODY)
            if (covered & (elsewhere.array.take(wanted) == NOBODY)).any():
                return False
        self.peers.late(part.link.address.host_id)
        return True

    def _fail(self, link: HostLink, error: Exception) -> None:
        """A host that refuses these rows in its own words is in order for the next ones; any other is lost."""
        if not isinstance(error, HostError):
            self.peers.lost(link.address.host_id, error)
