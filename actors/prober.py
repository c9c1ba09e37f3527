"""Lets hosts back: a thread that dials those that are out, and asks them until they answer as fast as they should.

It works on connections of its own, so that it never holds up a step; a connection that passed is handed over and
becomes the dispatcher's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final

import numpy as np
import structlog

from actors.link import HostLink
from actors.route import Held
from cluster.errors import ExpertmeshError

log = structlog.get_logger()

# Between two attempts to reach a host, and between two probes of one.
_PERIOD_S: Final = 0.1
# A frozen host accepts a connection and then says nothing.
_TIMEOUT_S: Final = 1.0
# A probe is good if it takes at most so many times as long as it once did, and so much more: a thread that waits
# for a core on a busy machine needs a few milliseconds for no fault of the host's.
_TIMES, _SLACK_S = 4.0, 0.005
_ROWS: Final = 16


@dataclass(slots=True)
class Target:
    """A host that is out, and what it must show."""

    make_link: Callable[[], HostLink]
    held: Held
    streak: int
    """Good probes in a row."""
    link: HostLink | None = None
    good: int = 0
    last_error: str = ""
    last_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Passed:
    """A host that may be asked again, by the connection that was probed."""

    host_id: str
    link: HostLink


@dataclass(slots=True)
class Prober:
    """Probes targets by host id until they pass. `passed` is read by the dispatcher between two dispatches."""

    passed: SimpleQueue[Passed] = field(default_factory=SimpleQueue)
    _targets: dict[str, Target] = field(default_factory=dict)
    _usual_s: dict[str, float] = field(default_factory=dict)
    """Per host the shortest probe ever: what it can do."""
    _change: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _closed: bool = False

    def watch(self, host_id: str, target: Target) -> None:
        """Probe a host from now on; replaces what was known of it as a target."""
        with self._change:
            self._targets[host_id] = target
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="expertmesh-probe", daemon=True)
                self._thread.start()
            self._change.notify()

    def forget(self, host_id: str) -> None:
        """Probe a host no more."""
        with self._change:
            self._targets.pop(host_id, None)

    def progress(self, host_id: str) -> str:
        """How far a host is with being let back, for people."""
        target = self._targets.get(host_id)
        if target is None:
            return ""
        if target.link is None:
            return f"not reached: {target.last_error or 'not tried yet'}"
        return f"{target.good} of {target.streak} good probes in a row, the last took {target.last_s * 1e3:.1f} ms"

    def learn(self, host_id: str, link: HostLink, held: Held) -> None:
        """Measure what a healthy, connected host can do; called before it serves, in the caller's thread."""
        best = min(probe(link, held) for _ in range(3))
        self._usual_s[host_id] = min(best, self._usual_s.get(host_id, best))

    def close(self) -> None:
        """End the thread."""
        with self._change:
            self._closed = True
            self._targets.clear()
            self._change.notify()

    def _run(self) -> None:
        while True:
            with self._change:
                # Without a target it waits: a thread that wakes up takes the interpreter from the step.
                self._change.wait_for(lambda: self._targets or self._closed)
                if self._closed:
                    return
                targets = list(self._targets.items())
            for host_id, target in targets:
                if self._attempt(host_id, target):
                    with self._change:
                        # A newer target of that name may have come meanwhile: then this one's result is void.
                        if self._targets.get(host_id) is not target:
                            continue
                        del self._targets[host_id]
                    assert target.link is not None
                    self.passed.put(Passed(host_id, target.link))
            time.sleep(_PERIOD_S)

    def _attempt(self, host_id: str, target: Target) -> bool:
        """Dial or probe once; whether the host has passed."""
        try:
            if target.link is None:
                link = target.make_link()
                link.connect(_TIMEOUT_S)
                link.set_deadline(_TIMEOUT_S)
                target.link, target.good = link, 0
            took = target.last_s = probe(target.link, target.held)
        except (OSError, ExpertmeshError) as error:
            if str(error) != target.last_error:
                log.info("expert host not back yet", host=host_id, reason=str(error))
                target.last_error = str(error)
            if target.link is not None:
                target.link.close()
            target.link = None
            return False
        usual = self._usual_s.setdefault(host_id, took)
        self._usual_s[host_id] = min(usual, took)
        target.good = target.good + 1 if took <= _TIMES * usual + _SLACK_S else 0
        return target.good >= target.streak


def probe(link: HostLink, held: Held) -> float:
    """Seconds that a real dispatch of some rows takes, to all experts that they can reach; raises what the link
    raises. A single expert would be computed within the slack, however slow the host.
    """
    layer, experts = held
    rows = min(_ROWS, link.layout.max_rows)
    views = link.buffers.views(rows)
    views.ids_np[:] = -1
    # Those of one row are distinct, as a router's are.
    columns = min(views.ids_np.shape[1], len(experts))
    views.ids_np[:, :columns] = np.resize(np.array(experts, np.int32), (rows, columns))
    views.weights_np[:] = 0
    views.x_raw[:] = 0
    started = time.perf_counter()
    link.send(layer, rows)
    link.receive()
    return time.perf_counter() - started
