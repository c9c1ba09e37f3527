"""The hosts of the placement table as one engine process sees them: connections, who is asked, who owns what.

`actors.dispatch` sends rows by it and tells it what it met; `actors.prober` brings hosts back that were out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np
import structlog
import torch

from actors.buffers import Layout
from actors.dispatch_stats import DispatchStats
from actors.latency import Latency
from actors.link import FAILURES, HostLink, LateError
from actors.membership import Membership, State
from actors.prober import Prober, Target
from actors.route import NOBODY, Owners, Route, owners
from actors.share import Share
from cluster.cost_fit import Timing, corrected, next_factor
from cluster.errors import HostError, ProtocolError
from cluster.frame import manifest_id
from cluster.messages import HostAddress, HostCost, HostWork

if TYPE_CHECKING:
    from actors.split import Split

log = structlog.get_logger()

# Pause between attempts to reach a host that is starting; short against its load time.
_RECONNECT_PAUSE_S = 0.1
# How long a step waits for a connection. One that broke may have been all that broke: it is made anew within the
# step where nobody else holds the experts, but not again for a while.
_REDIAL_S, _REDIAL_PAUSE_S = 0.25, 1.0
_PING_S = 0.25
# What hosts cost is corrected with every sample, and used after so many.
_LEARNT_APART = 32
_UNMEASURED = HostCost(0.0, 1e-4, 1e-5)

KeepOff = Callable[[Mapping[int, Owners]], bool]


class Peers:
    """Used by the one thread that steps; `route` is the placement table in use.

    `deadline_s` is the longest wait for an answer that nobody else can give, `min_deadline_s` the shortest after
    which an answer counts as late. `keep_off` is told who owns what whenever that changes, and says whether the
    router now keeps off experts that have no owner (`keeps_off`).
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
        min_deadline_s: float,
        keep_off: KeepOff | None,
    ) -> None:
        self.layout = layout
        self.deadline_s, self._min_deadline_s = deadline_s, min_deadline_s
        self.stats = DispatchStats()
        self._node_id, self._model, self._key = node_id, model, key
        self.members = Membership()
        self._prober = Prober()
        self._links: dict[str, HostLink] = {}
        self._latency: dict[str, Latency] = {}
        self._redialled: dict[str, float] = {}
        self._factors: dict[str, float] = {}
        self._learnt = 0
        self._keep_off = keep_off
        # From then on hosts of a new table are reached here, or by the prober.
        self._connected = False
        self.keeps_off = False
        self.unsettled = False
        """Whether there may be something to catch up with."""
        self.only: HostLink | None = None
        """The host that gets all rows as they are: it holds everything, and no other is asked."""
        self.set_route(route)

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
                if self._connected and self._answers(self._links[name]):
                    self._prober.forget(name)
                    self.members.let_in(name, monotonic())
            self._links[name].set_epoch(manifest, route.epoch)
            if self._connected and self.members.state(name) is State.OUT:
                self._watch(position, address)
        self._refresh()

    def connect(self, timeout_s: float) -> None:
        """Connect to every host, waiting for those that are still starting; HostError names the missing."""
        # Another table may bring the first replicas while requests run. Not with this module: vLLM 0.32 looks through
        # all that is imported when it starts, and stumbles over Numba.
        from cluster.assign import warm

        warm()
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
        self._connected = True
        self._refresh()

    def reachable(self) -> dict[str, float]:
        """Round-trip seconds of every host that is asked; HostError if an expert is left without a living one.

        A host that does not answer at once is treated as one that is late in a dispatch.
        """
        self.catch_up()
        times = {}
        for name in self.members.named(State.ASKED):
            try:
                times[name] = self._links[name].ping(_PING_S)
            except LateError:
                self.late(name)
            except FAILURES as error:
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
        self.catch_up()
        return {
            address.host_id: {
                "state": self.members.state(address.host_id).value,
                "reason": self.members.reason(address.host_id),
                "probes": self._prober.progress(address.host_id),
            }
            for address in self.route.hosts
        }

    def close(self) -> None:
        """Drop every connection, probe no more."""
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

    def assigned(self, layer: int, ids_TK: torch.Tensor) -> tuple[Owners, np.ndarray | None]:
        """Who is asked for which expert for these ids, and who answers each pair [T·K] if an expert's are divided.

        Where experts have several hosts that are asked, the hosts' costs decide; see `actors.split`.
        """
        of_layer = self.owners(layer)
        if layer not in self._splits:
            self._splits[layer] = self._split(layer)
        split = self._splits[layer]
        return (of_layer, None) if split is None else split.owners(ids_TK.numpy().reshape(-1))

    def learn(self, works: Sequence[HostWork]) -> None:
        """Take in what hosts took for what they were asked: what they cost follows, now and then."""
        for work in works:
            before = self._measured.get(work.host_id)
            if before is not None and work.compute_s > 0:
                seen = [Timing(work.pairs, work.experts, work.compute_s)]
                self._factors[work.host_id] = next_factor(self._factors.get(work.host_id, 1.0), before, seen)
        self._learnt += 1
        if not self._learnt % _LEARNT_APART:
            costs = self._costs()
            for split in self._splits.values():
                if split is not None:
                    split.set_costs(costs)

    def _split(self, layer: int) -> Split | None:
        from actors.split import Split  # see `connect`

        replicas = self.route.replicas[layer]
        several = any(len(self._asked.intersection(hosts)) > 1 for hosts in replicas)
        if not several or not all(self._asked.intersection(hosts) for hosts in replicas):
            return None
        return Split(replicas, self._asked, self._costs())

    def _costs(self) -> list[HostCost]:
        """Of every host, as it is now; all alike where not all were measured."""
        if not self.route.costs:
            return [_UNMEASURED] * len(self.route.hosts)
        return [
            corrected(cost, self._factors.get(address.host_id, 1.0))
            for address, cost in zip(self.route.hosts, self.route.costs, strict=True)
        ]

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
        now_ns = perf_counter_ns()
        self._latency[part.link.address.host_id].observe(part.rows, (now_ns - sent_ns) / 1e9, now_ns / 1e9)

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
        self.unsettled = bool(self._suspected) or len(self._asked) < len(self.route.hosts)
        self._ordered = [self._links[address.host_id] for address in self.route.hosts]
        self._owners: dict[int, Owners] = {}
        self._splits: dict[int, Split | None] = {}
        self._measured = dict(zip((a.host_id for a in self.route.hosts), self.route.costs, strict=False))
        self._version = self.members.version
        self.only = None
        if len(self._asked) == 1 and not self._suspected:
            only = next(iter(self._asked))
            if all(only in hosts for experts in self.route.replicas.values() for hosts in experts):
                self.only = self._ordered[only]
                self.only.set_deadline(self.deadline_s)
        if self._keep_off is not None:
            self.keeps_off = self._keep_off({layer: self.owners(layer) for layer in self.route.replicas})
        self.stats.ejected = len(self.route.hosts) - len(self._asked) - len(self._suspected)

    def catch_up(self) -> None:
        """Take in what happened to suspected hosts and to those that are out. Between two layers."""
        for name in self.members.named(State.SUSPECTED):
            try:
                if self._links[name].catch_up():
                    self.members.caught_up(name)
                elif self.members.overdue(name, monotonic()):
                    self._put_out(name)
            except FAILURES as error:
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

    def deadline(self, part: Share) -> float:
        """Seconds after which the answer to a share is late."""
        return self._latency[part.link.address.host_id].deadline(part.rows)
