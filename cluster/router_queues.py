"""The queues of all routers, as each of them last told: the controller keeps them for the autoscaler."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.group_loads import Queue


class RouterQueues:
    """Calls may come from several threads."""

    def __init__(self, clock: Callable[[], float], fresh_s: float) -> None:
        """A router that has not told anything for `fresh_s` seconds is gone, and counts no more."""
        self._clock = clock
        self._fresh_s = fresh_s
        self._told: dict[str, tuple[float, Queue]] = {}
        self._lock = threading.Lock()

    def tell(self, router: str, queue: Queue) -> None:
        """A router's queue as it is now."""
        with self._lock:
            self._told[router] = self._clock(), queue

    def total(self) -> Queue | None:
        """All of them together; None if no router has told anything lately."""
        with self._lock:
            oldest = self._clock() - self._fresh_s
            self._told = {router: told for router, told in self._told.items() if told[0] >= oldest}
            queues = [queue for _, queue in self._told.values()]
        if not queues:
            return None
        return Queue(sum(queue.waiting for queue in queues), sum(queue.running for queue in queues))
