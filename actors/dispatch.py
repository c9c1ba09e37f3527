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

import time
from collections.abc import Callable, Mapping
from time import monotonic, perf_counter_ns

import numpy as np
import structlog
import torch

from actors.buffers import Layout
from actors.latency import Latency
from actors.link import HostLink, LateError
from actors.membership import Membership, State
from actors.operands import check_operands
from actors.prober import Prober, Target
from actors.rescue import Operands, Outage, Rescue
from actors.route import NOBODY, Owners, Route, owners
from actors.share import Share, combine, shares
from cluster.errors import HostError, ProtocolError
from cluster.frame import ITEM_BYTES, manifest_id
from cluster.messages import HostAddress

log = structlog.get_logger()

# Pause between attempts to reach a host that is starting; short against its load time.
_RECONNECT_PAUSE_S = 0.1
# How long a step waits for a connection. One that broke may have been all that broke: it is made anew within the
# step where nobody else holds the experts, but not again for a while.
_REDIAL_S, _REDIAL_PAUSE_S = 0.25, 1.0
_PING_S = 0.25
# What says that a host can't answer; LateError is handled before them.
_FAILURES = (OSError, ProtocolError, HostError)


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
        keep_off: Callable[[Mapping[int, Owners]], bool] | None = None,
    ) -> None:
        self.layout = layout
        self._max_rows = layout.max_rows
        self._row_bytes, self._pair_bytes = layout.hidden * ITEM_BYTES[layout.dtype], layout.top_k * 4
        self._checked: set[int] = set()
        self.deadline_s, self._min_deadline_s = deadline_s, min_deadline_s
        self.stats = DispatchStats()
        self._node_id, self._model, self._key = node_id, model, key
        self.members = Membership()
        self._prober = Prober()
        self._links: dict[str, HostLink] = {}
        self._latency: dict[str, Latency] = {}
        self._redialled: dict[str, float] = {}
        self._on_outage, self._keep_off = on_outage, keep_off
        self._keeps_off = False
        self._rescue = Rescue(self, drop=drop, on_outage=on_outage)
        self.set_route(route)

    # The table and the members ---------------------------------------------------------------------------

    def set_route(self, route: Route) -> None:
        """Use another placement table from the next call on. Called between two steps.

        A host that is new in it, or has another address, is asked from now on if it can be reached at once, which
        one that was published as ready can; else as soon as the prober has reached it.
        """
        names = [address.host_id for address in route.hosts]
        known = {name: link.address for name, link in self._links.items()}
        self.members.keep(names)
        for gone in known.keys() - set(names):
            self._prober.forget(gone)
            self._links.pop(gone).close()
        self.route = route
        manifest = manifest_id(route.manifest)
        for position, address in enumerate(route.hosts):
            name = address.host_id
            if known.get(name) != address:
                if name in known:
                    self._links[name].close()
                    self.members.lost(name, "restarted")
                self._links[name] = self._make_link(address)
                self._latency[name] = Latency(self._min_deadline_s, self.deadline_s)
                if known and self._answers(self._links[name]):
                    self._prober.forget(name)
                    self.members.let_in(name, monotonic())
            self._links[name].set_epoch(manifest, route.epoch)
            if known and self.members.state(name) is State.OUT:
                self._watch(position, address)
        self._refresh()

    def connect(self, timeout_s: float) -> None:
        """Connect to every host, waiting for those that are still starting; HostError names the missing."""
        deadline = time.monotonic() + timeout_s
        for position, address in enumerate(self.route.hosts):
            link = self._links[address.host_id]
            if not link.connected:
                self._reach(link, deadline)
                held = self.route.held_by(position)
                # What a host can do tells when one that was ejected may come back: only one with a replica is.
                if held is not None and self.route.replicated:
                    self._prober.learn(address.host_id, link, held)
                self.members.let_in(address.host_id, monotonic())
        self._refresh()

    def reachable(self) -> dict[str, float]:
        """Round-trip seconds of every host that is asked; HostError if an expert is left without a living one.

        A host that does not answer at once is treated as one that is late in a dispatch.
        """
        self._catch_up()
        times = {}
        for name in self.members.named(State.ASKED):
            try:
                times[name] = self._links[name].ping(_PING_S)
            except LateError:
                self.late(name)
            except _FAILURES as error:
                self.lost(name, error)
        for layer in self.route.replicas:
            of_layer = self.owners(layer)
            if not of_layer.complete:
                expert = of_layer.listed.index(NOBODY)
                raise HostError(
                    f"no living host holds expert {expert} of layer {layer}", "see `expertmesh status`"
                )
        return times

    def standing(self) -> dict[str, dict[str, str]]:
        """Per host its state, and why it is out. A host that passed its probes is let back, traffic or not."""
        self._catch_up()
        return {
            address.host_id: {
                "state": self.members.state(address.host_id).value,
                "reason": self.members.reason(address.host_id),
                "probes": self._prober.progress(address.host_id),
            }
            for address in self.route.hosts
        }

    def close(self) -> None:
        """Drop every connection."""
        self._prober.close()
        for link in self._links.values():
            link.close()

    @property
    def asked(self) -> frozenset[int]:
        """Positions of the hosts that are asked now."""
        if self._version != self.members.version:
            self._refresh()
        return self._asked

    @property
    def links(self) -> list[HostLink]:
        """Every host's connection, in the route's order."""
        if self._version != self.members.version:
            self._refresh()
        return self._ordered

    def owners(self, layer: int) -> Owners:
        """Who is asked for which expert of a layer now; made once per layer and change of the members."""
        if self._version != self.members.version:
            self._refresh()
        found = self._owners.get(layer)
        if found is None:
            found = self._owners[layer] = owners(self.route.replicas[layer], self._asked, self._suspected)
        return found

    def late(self, name: str) -> None:
        """An answer of the host is late."""
        self.stats.late += 1
        self.stats.last_detect_ns = time.monotonic_ns()
        self.members.late(name, monotonic())
        if self.members.state(name) is State.OUT:
            self._put_out(name)

    def lost(self, name: str, error: Exception) -> None:
        """The host's connection is of no use any more."""
        self.stats.lost += 1
        self.stats.last_detect_ns = time.monotonic_ns()
        self.members.lost(name, str(error))
        self._put_out(name)

    def answered(self, part: Share, sent_ns: int) -> None:
        """A share came back in time."""
        self._latency[part.link.address.host_id].observe(part.rows, (perf_counter_ns() - sent_ns) / 1e9)

    def redial(self, position: int) -> bool:
        """Try once to reach a host that is out, now; whether it may be asked again."""
        address = self.route.hosts[position]
        name, now = address.host_id, monotonic()
        if now - self._redialled.get(name, float("-inf")) < _REDIAL_PAUSE_S:
            return False
        self._redialled[name] = now
        link = self._make_link(address)
        link.set_epoch(manifest_id(self.route.manifest), self.route.epoch)
        if not self._answers(link):
            return False
        self._prober.forget(name)
        self._adopt(name, link)
        return True

    def _answers(self, link: HostLink) -> bool:
        """Connect, with little patience; whether the host could be reached."""
        try:
            link.connect(_REDIAL_S)
            link.set_deadline(self.deadline_s)
        except (OSError, ProtocolError):
            return False
        return True

    def _refresh(self) -> None:
        """What follows from the members' states and the route."""
        position = {address.host_id: index for index, address in enumerate(self.route.hosts)}
        self._asked = frozenset(position[name] for name in self.members.named(State.ASKED))
        self._suspected = {position[name] for name in self.members.named(State.SUSPECTED)}
        self._unsettled = bool(self._suspected) or len(self._asked) < len(self.route.hosts)
        self._ordered = [self._links[address.host_id] for address in self.route.hosts]
        self._owners: dict[int, Owners] = {}
        self._version = self.members.version
        # One host that holds everything gets all rows as they are, without being late to anybody else.
        self._only: HostLink | None = None
        if len(self._asked) == 1 and not self._suspected:
            only = next(iter(self._asked))
            if all(only in hosts for experts in self.route.replicas.values() for hosts in experts):
                self._only = self._ordered[only]
                self._only.set_deadline(self.deadline_s)
        if self._keep_off is not None:
            self._keeps_off = self._keep_off({layer: self.owners(layer) for layer in self.route.replicas})
        self.stats.ejected = len(self.route.hosts) - len(self._asked) - len(self._suspected)

    def _catch_up(self) -> None:
        """Take in what happened to suspected hosts and to those that are out. Between two layers."""
        for name in self.members.named(State.SUSPECTED):
            try:
                if self._links[name].catch_up():
                    self.members.caught_up(name)
                elif self.members.overdue(name, monotonic()):
                    self._put_out(name)
            except _FAILURES as error:
                self.lost(name, error)
        passed = self._prober.passed
        while not passed.empty():
            back = passed.get()
            address = next((host for host in self.route.hosts if host.host_id == back.host_id), None)
            if address == back.link.address and self.members.state(back.host_id) is State.OUT:
                back.link.set_epoch(manifest_id(self.route.manifest), self.route.epoch)
                self._adopt(back.host_id, back.link)
            else:
                back.link.close()
        if self._version != self.members.version:
            self._refresh()

    def _adopt(self, name: str, link: HostLink) -> None:
        self._links[name].close()
        self._links[name] = link
        link.set_deadline(self.deadline_s)
        self.members.let_in(name, monotonic())
        self.stats.let_back += 1
        log.info("expert host is back", host=name)

    def _put_out(self, name: str) -> None:
        log.warning("expert host out", host=name, reason=self.members.reason(name))
        self._links[name].close()
        position = next(i for i, address in enumerate(self.route.hosts) if address.host_id == name)
        self._watch(position, self.route.hosts[position])

    def _watch(self, position: int, address: HostAddress) -> None:
        held = self.route.held_by(position)
        if held is not None:
            epoch = manifest_id(self.route.manifest), self.route.epoch

            def make() -> HostLink:
                link = self._make_link(address)
                link.set_epoch(*epoch)
                return link

            self._prober.watch(address.host_id, Target(make, held, self.members.streak(address.host_id)))

    def _make_link(self, address: HostAddress) -> HostLink:
        local = address.node_id == self._node_id
        return HostLink(address, self.layout, local=local, model=self._model, key=self._key)

    def _reach(self, link: HostLink, deadline: float) -> None:
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

    # One layer -------------------------------------------------------------------------------------------

    def __call__(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
        first_row: int = 0,
    ) -> None:
        """Fill `out_TH` with the routed experts' weighted sum per row.

        Args: x and out [T, H] in the connection's dtype, weights [T, K] float32, ids [T, K] int32; all
        contiguous, since rows are copied as plain memory. `first_row` is what an outage adds to its row numbers.
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
        if rows > step:
            for start in range(0, rows, step):
                part = slice(start, start + step)
                self(layer, x_TH[part], weights_TK[part], ids_TK[part], out_TH[part], first_row + start)
            return
        started = perf_counter_ns()
        if self._unsettled:
            self._catch_up()
        link = self._only
        if link is None:
            self._spread(layer, x_TH, weights_TK, ids_TK, out_TH, first_row)
        else:
            # One host holds every expert: all rows go there as they are, one copy each way.
            addresses = x_TH.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(), out_TH.data_ptr()
            try:
                (link.exchanges.get((layer, rows)) or link.make_exchange(layer, rows))(*addresses)
            except _FAILURES as error:
                self._fail(link, error)
                operands = Operands(layer, x_TH, weights_TK, ids_TK, out_TH, first_row)
                refusing = self.asked if isinstance(error, HostError) else frozenset()
                self._rescue(operands, [], [], refusing, error)
        stats = self.stats
        if self._keeps_off:
            stats.degraded_rows += rows
            reason = "some experts have no living host; the router chose among the others"
            self._on_outage(Outage(layer, tuple(range(first_row, first_row + rows)), reason, degraded=True))
        stats.dispatches += 1
        stats.rows += rows
        elapsed = perf_counter_ns() - started
        stats.nanoseconds += elapsed
        if elapsed > stats.slowest_ns:
            stats.slowest_ns = elapsed

    def _spread(
        self,
        layer: int,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        out_TH: torch.Tensor,
        first_row: int,
    ) -> None:
        of_layer = self.owners(layer)
        sent: list[Share] = []
        error: Exception | None = None
        for part in shares(of_layer, self._ordered, x_TH, weights_TK, ids_TK):
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
        else:
            operands = Operands(layer, x_TH, weights_TK, ids_TK, out_TH, first_row)
            self._rescue(operands, done, late, refusing, error)

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
        link = part.link
        name = link.address.host_id
        try:
            link.set_deadline(self._latency[name].deadline(part.rows) if hedged else self.deadline_s)
            link.receive()
        except LateError as error:
            if not hedged:
                self.lost(name, error)
            return error
        except _FAILURES as error:
            self._fail(link, error)
            return error
        self.answered(part, link.sent_ns)
        return None

    def _hedge(self, layer: int, ids_TK: torch.Tensor, part: Share) -> bool:
        """Whether others can be asked in place of a host whose answer is late; it is then marked as late."""
        elsewhere = owners(self.route.replicas[layer], self.asked - {part.position}, ())
        if not elsewhere.complete:
            covered = part.covers()
            wanted = np.where(covered, ids_TK.numpy(), NOBODY)
            if (covered & (elsewhere.array.take(wanted) == NOBODY)).any():
                return False
        self.late(part.link.address.host_id)
        return True

    def _fail(self, link: HostLink, error: Exception) -> None:
        """A host that refuses these rows in its own words is in order for the next ones; any other is lost."""
        if not isinstance(error, HostError):
            self.lost(link.address.host_id, error)


class DispatchStats:
    """Counters of one engine process, read by its metrics; plain integers, one writer."""

    def __init__(self) -> None:
        self.dispatches = 0
        self.rows = 0
        self.nanoseconds = 0
        self.slowest_ns = 0
        """The longest dispatch of all."""
        self.lost = 0
        """Connections to hosts that ended."""
        self.late = 0
        """Answers that were late."""
        self.hedges = 0
        """Dispatches whose late rows were sent to another replica."""
        self.failovers = 0
        """Dispatches in which a lost host's rows were sent to another replica."""
        self.let_back = 0
        self.ejected = 0
        """Hosts of the table that are out now."""
        self.unanswered_rows = 0
        self.degraded_rows = 0
        self.last_detect_ns = 0
        """`time.monotonic_ns` when a host was last found late or lost; 0 if never."""
        self.last_reroute_ns = 0
        """`time.monotonic_ns` when another replica last answered in such a host's place."""
