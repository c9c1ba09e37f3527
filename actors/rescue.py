"""What a dispatch does when hosts are gone or late: the same rows go to other replicas.

Hosts hold no request state, so any rows may be sent any number of times. Of a late host's answer and its
replicas' the first is taken; the other is dropped by its number when it comes.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from actors.link import LateError
from actors.route import NOBODY, owners
from actors.share import Share, add, shares
from cluster.errors import HostError

if TYPE_CHECKING:
    from actors.dispatch import Dispatcher


@dataclass(frozen=True, slots=True)
class Outage:
    """Rows of a dispatch that not all of their experts could answer for."""

    layer: int
    rows: tuple[int, ...]
    """Row numbers in the step's batch."""
    reason: str
    degraded: bool
    """Whether they were computed without those experts, as the operator chose; else they are of no use."""


class Operands(NamedTuple):
    """What a dispatch was called with; see `Dispatcher`."""

    layer: int
    x_TH: torch.Tensor
    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    out_TH: torch.Tensor
    first_row: int


class Rescue:
    """Finishes a dispatch of `dispatcher` that could not be finished the plain way."""

    def __init__(self, dispatcher: Dispatcher, *, drop: bool, on_outage: Callable[[Outage], None]) -> None:
        self._dispatcher = dispatcher
        self._drop = drop
        self._on_outage = on_outage

    def __call__(
        self,
        operands: Operands,
        done: Sequence[Share],
        late: Sequence[Share],
        refused: Collection[int],
        error: Exception | None,
    ) -> None:
        """Fill the sums, given the shares that came back and those that are late; all others are lost.

        `refused` are the positions of hosts that are in order and will not compute these rows, `error` is the last
        that was met.
        """
        dispatcher = self._dispatcher
        layer, x_TH, weights_TK, ids_TK, out_TH, _ = operands
        ids = ids_TK.numpy()
        total_TH = torch.zeros(out_TH.shape)
        # First of all: the links' memory is needed for what is sent next.
        add(done, total_TH)
        owed = (ids != NOBODY) & ~_covered(done, ids.shape)
        originals = {part.position: part for part in late if part.link.connected}
        refusing = set(refused)
        unanswered = np.zeros_like(owed)
        while owed.any():
            of_layer = owners(
                dispatcher.peers.route.replicas[layer],
                dispatcher.peers.asked - refusing - originals.keys(),
                (),
            )
            gaps = owed & (of_layer.array.take(np.where(owed, ids, NOBODY)) == NOBODY)
            if gaps.any():
                only_late = [part for part in originals.values() if (gaps & part.covers()).any()]
                if only_late:
                    # Whoever could have answered in their place is gone meanwhile.
                    for part in only_late:
                        del originals[part.position]
                        error = self._take([part], refusing, total_TH, owed) or error
                elif not self._redial(layer, ids[gaps], refusing):
                    unanswered |= gaps
                    owed &= ~gaps
                continue
            wanted = torch.from_numpy(np.where(owed, ids, NOBODY).astype(np.int32))
            parts: list[Share] = []
            for part in shares(of_layer, dispatcher.peers.links, x_TH, weights_TK, wanted):
                failed = dispatcher.send(layer, part)
                if failed is None:
                    parts.append(part)
                error = failed or error
            if not parts:
                continue
            if originals:
                dispatcher.stats.hedges += 1
            else:
                dispatcher.stats.failovers += 1
            # The late ones can win only if nothing is owed that they do not bring.
            racing = list(originals.values())
            if (owed & ~_covered(racing, ids.shape)).any():
                racing = []
            for part in self._first(parts, racing):
                error = self._take([part], refusing, total_TH, owed) or error
                originals.pop(part.position, None)
        dispatcher.stats.last_reroute_ns = time.monotonic_ns()
        self._finish(operands, total_TH, unanswered, error)

    def _take(
        self, parts: Sequence[Share], refusing: set[int], total_TH: torch.Tensor, owed: np.ndarray
    ) -> Exception | None:
        """Receive shares and add them to the sum, their pairs owed no more; the last error."""
        error = None
        for part in parts:
            failed = self._dispatcher.receive(part, hedged=False)
            if failed is None:
                add([part], total_TH)
                owed &= ~part.covers()
            elif isinstance(failed, HostError):
                refusing.add(part.position)
            error = failed or error
        return error

    def _first(self, parts: Sequence[Share], racing: Sequence[Share]) -> list[Share]:
        """Wait until all of `parts`, or all of `racing`, can be received; those. Hosts past the deadline are lost."""
        dispatcher = self._dispatcher
        poll = select.poll()
        waiting: dict[int, Share] = {}
        for part in (*parts, *racing):
            waiting[part.link.fileno()] = part
            poll.register(part.link.fileno(), select.POLLIN)
        ready: set[int] = set()
        end = time.monotonic() + dispatcher.peers.deadline_s
        while True:
            for side in (racing, parts):
                if side and all(part.position in ready for part in side):
                    return list(side)
            events = poll.poll(max(0.0, end - time.monotonic()) * 1e3)
            if not events:
                for part in waiting.values():
                    name = part.link.address.host_id
                    dispatcher.peers.lost(name, LateError(f"expert host {name} did not answer in time"))
                return [part for part in parts if part.position in ready]
            for descriptor, _ in events:
                part = waiting[descriptor]
                # An old answer that nobody waits for may be all that there is to read.
                if part.link.has_answer():
                    poll.unregister(descriptor)
                    ready.add(waiting.pop(descriptor).position)

    def _redial(self, layer: int, experts: np.ndarray, refusing: set[int]) -> bool:
        """Whether a host of one of these experts could be reached again."""
        replicas = self._dispatcher.peers.route.replicas[layer]
        holders = {host for expert in set(experts.tolist()) for host in replicas[expert]}
        return any([self._dispatcher.peers.redial(host) for host in sorted(holders - refusing)])

    def _finish(
        self, operands: Operands, total_TH: torch.Tensor, unanswered: np.ndarray, error: Exception | None
    ) -> None:
        layer, _, weights_TK, ids_TK, out_TH, first_row = operands
        rows = np.flatnonzero(unanswered.any(axis=1))
        if rows.size:
            if self._drop:
                weights = weights_TK.numpy()
                left = np.where(unanswered, 0, weights).sum(axis=1)
                # Of a row that lost all its experts nothing is left to scale.
                scale = np.divide(weights.sum(axis=1), left, out=np.zeros_like(left), where=left > 0)
                total_TH *= torch.from_numpy(scale)[:, None]
                self._dispatcher.stats.degraded_rows += len(rows)
            else:
                total_TH[torch.from_numpy(rows)] = 0
                self._dispatcher.stats.unanswered_rows += len(rows)
        out_TH.copy_(total_TH)
        if rows.size:
            expert = int(ids_TK.numpy()[unanswered][0])
            reason = f"no living host holds expert {expert} of layer {layer}"
            if error is not None:
                reason += f" ({error})"
            self._on_outage(Outage(layer, tuple((rows + first_row).tolist()), reason, self._drop))


def _covered(parts: Sequence[Share], shape: tuple[int, ...]) -> np.ndarray:
    """bool [T, K]: which pairs of row and expert the parts bring."""
    covered = np.zeros(shape, bool)
    for part in parts:
        covered |= part.covers()
    return covered
