"""Which of several operators acts: a Lease of coordination.k8s.io.

A lease that is not renewed for its whole duration may be taken. That is counted from when this process saw the last
renewal, by its own clock: the clocks of two machines are never compared. Who holds it stops well before that, so
that a call that is on its way has ended when another begins.

Losing it: `holds` is false from the renew deadline on, whatever the API server does, and nothing is written then.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from cluster.kube import LEASES, KubeApi, Object
from cluster.kube_errors import AbsentError, ConflictError, ForbiddenError, KubeError

log = structlog.get_logger()

# A tick that is under way ends by its calls' time limits.
_END_S: Final = 10.0


class NotLeaderError(KubeError):
    """Another one acts now, or nobody knows: nothing may be written."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """As Kubernetes' own controllers have them."""

    duration_s: float = 15.0
    deadline_s: float = 10.0
    """From the last renewal on, until which the holder writes."""
    retry_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What was last seen of a lease, and when it changed, by this process's clock."""

    holder: str
    renewed: str
    at: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What to do about the lease now."""

    seen: Seen | None
    write: dict[str, Any] | None
    """The lease's new spec; None to wait."""


def turn(
    lease: Object | None, me: str, seen: Seen | None, now: float, wall: datetime, times: LeaseTimes
) -> Turn:
    """Whether the lease is to be taken or renewed; `lease` is None if there is none."""
    spec = dict((lease or {}).get("spec") or {})
    holder, renewed = str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or "")
    if lease is not None and (seen is None or (seen.holder, seen.renewed) != (holder, renewed)):
        seen = Seen(holder, renewed, now)
    duration = float(spec.get("leaseDurationSeconds") or times.duration_s)
    if holder not in ("", me) and seen is not None and now - seen.at < duration:
        return Turn(seen, None)
    stamp = wall.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    mine = holder == me
    spec |= {
        "holderIdentity": me,
        "leaseDurationSeconds": max(1, round(times.duration_s)),
        "renewTime": stamp,
        "acquireTime": (spec.get("acquireTime") if mine else None) or stamp,
        "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (lease is not None and not mine),
    }
    return Turn(seen, spec)


class Leader:
    """One candidate. `tick` is called by one thread; `holds` by any."""

    def __init__(
        self,
        api: KubeApi,
        name: str,
        identity: str,
        times: LeaseTimes | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api, self._name, self.identity = api, name, identity
        self.times = times or LeaseTimes()
        self._clock, self._wall = clock, wall
        self._seen: Seen | None = None
        self._until = float("-inf")
        self._closed = threading.Event()

    def holds(self) -> bool:
        """Whether this one may write now."""
        return self._clock() < self._until

    def must_hold(self) -> None:
        """NotLeaderError unless this one may write now."""
        if not self.holds():
            raise NotLeaderError(f"{self.identity} does not hold the lease {self._name}")

    @property
    def holder(self) -> str:
        """Who held it when it was last looked at."""
        return self._seen.holder if self._seen is not None else ""

    def tick(self) -> bool:
        """Take the lease or renew it if that can be; whether this one holds it. ForbiddenError if it never can."""
        before, held = self._clock(), self.holds()
        try:
            self._try(before)
        except ConflictError:
            # Another one wrote it since it was read.
            self._until = float("-inf")
        except ForbiddenError:
            raise
        except KubeError as error:
            log.warning("lease not renewed", reason=error.message)
        if held != self.holds():
            log.info("leads" if self.holds() else "leads no more", identity=self.identity, holder=self.holder)
        return self.holds()

    def release(self) -> None:
        """Let another one take it at once."""
        self._closed.set()
        if not self.holds():
            return
        self._until = float("-inf")
        try:
            lease = dict(self._api.get(LEASES, self._name))
            if lease["spec"].get("holderIdentity") == self.identity:
                lease["spec"] = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
                self._api.replace(LEASES, self._name, lease)
        except KubeError as error:
            log.warning("lease not released", reason=error.message)

    @contextmanager
    def running(self, failed: Callable[[Exception], None]) -> Iterator[None]:
        """Tick in a thread for a block, and let go of the lease at its end; `failed` hears what can't be mended."""

        def ticking() -> None:
            while True:
                try:
                    self.tick()
                except Exception as error:
                    failed(error)
                    return
                if self._closed.wait(self.times.retry_s * random.uniform(0.8, 1.2)):
                    return

        thread = threading.Thread(target=ticking, name="expertmesh-leader", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            thread.join(_END_S)
            self.release()

    def _try(self, before: float) -> None:
        lease: Object | None
        try:
            lease = self._api.get(LEASES, self._name)
        except AbsentError:
            lease = None
        wanted = turn(lease, self.identity, self._seen, before, self._wall(), self.times)
        self._seen = wanted.seen
        if wanted.write is None:
            self._until = float("-inf")
            return
        meta = {"name": self._name, "namespace": self._api.namespace}
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            **(lease or {"metadata": meta}),
            "spec": wanted.write,
        }
        if lease is None:
            self._api.create(LEASES, body)
        else:
            self._api.replace(LEASES, self._name, body)
        self._seen = Seen(self.identity, str(wanted.write["renewTime"]), before)
        # From before it was asked for: that is when others may begin to count at the earliest.
        self._until = before + self.times.deadline_s
