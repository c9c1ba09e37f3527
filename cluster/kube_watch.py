"""Objects of one kind as they are by now: listed once, then followed, in a thread of its own.

After 410 Gone, a connection that ended or a server that was away it lists again, with pauses that grow; what was seen
last is shown meanwhile. Nothing else is lost: whoever decides by it decides anew from what is there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from cluster.kube import KubeApi, Listed, Object, Resource, WatchEvent
from cluster.kube_errors import ForbiddenError, GoneError, KubeError

log = structlog.get_logger()

_WATCH_S: Final = 240.0
"""A watch ends after this time, and is begun again where it ended."""
_FIRST_PAUSE_S: Final = 0.25
_LAST_PAUSE_S: Final = 15.0
_END_S: Final = 10.0


class Followed:
    """All objects of one kind."""

    def __init__(self, api: KubeApi, resource: Resource, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change, in the thread that follows."""
        self._api, self.resource, self._changed = api, resource, changed
        self._lock = threading.Lock()
        self._objects: dict[str, Object] = {}
        self._version = ""
        self._synced = threading.Event()
        self._closed = threading.Event()
        self.listed = 0
        """How often everything was listed."""

    def synced(self, timeout_s: float) -> bool:
        """Whether they were ever listed; waits so long for it."""
        return self._synced.wait(timeout_s)

    def all(self) -> tuple[Object, ...]:
        """As last seen, in no order."""
        with self._lock:
            return tuple(self._objects.values())

    def refresh(self) -> None:
        """List everything now. KubeError if that can't be."""
        self._take(self._api.list_all(self.resource))

    @contextmanager
    def following(self, failed: Callable[[Exception], None]) -> Iterator[None]:
        """Follow in a thread for a block; `failed` hears of what trying again does not mend."""
        thread = threading.Thread(
            target=self._follow, args=(failed,), name=f"expertmesh-{self.resource.plural}", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            # A watch that waits is not waited for: its thread ends with the process, or with the watch.
            self._closed.set()

    def _follow(self, failed: Callable[[Exception], None]) -> None:
        pause = 0.0
        while not self._closed.wait(pause):
            try:
                if not self._version:
                    self.refresh()
                for event in self._api.watch(self.resource, self._version, _WATCH_S):
                    if self._closed.is_set():
                        return
                    self._apply(event)
                    pause = 0.0
                # It ended in time, or its connection was cut off in between.
                pause = _FIRST_PAUSE_S
            except GoneError:
                self._version = ""
                pause = _FIRST_PAUSE_S
            except ForbiddenError as error:
                failed(error)
                return
            except KubeError as error:
                log.warning("not followed", kind=self.resource.plural, reason=error.message)
                # Where the server was away its memory of what went before may be gone as well.
                self._version = ""
                pause = min(_LAST_PAUSE_S, max(_FIRST_PAUSE_S, pause * 2)) * random.uniform(0.8, 1.2)
            except Exception as error:
                failed(error)
                return

    def _take(self, listed: Listed) -> None:
        with self._lock:
            self._objects = {_key(item): item for item in listed.items}
            self._version = listed.version
            self.listed += 1
        self._synced.set()
        self._changed()

    def _apply(self, event: WatchEvent) -> None:
        with self._lock:
            if event.kind == "DELETED":
                self._objects.pop(_key(event.object), None)
            elif event.kind != "BOOKMARK":
                self._objects[_key(event.object)] = event.object
            self._version = str(event.object["metadata"]["resourceVersion"])
        if event.kind != "BOOKMARK":
            self._changed()


def _key(item: Object) -> str:
    return f"{item['metadata'].get('namespace', '')}/{item['metadata']['name']}"
