"""One question in flight at a time: who asks meanwhile, or just after, gets the same answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Calls `ask` for many callers. An answer is kept for `keep_s` seconds, a failure is not.

    `ask` must come to an end by itself: it goes on although those who waited for it have left.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], keep_s: float) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._flight: asyncio.Future[T] | None = None
        self._kept: tuple[float, T] | None = None
        """Until when the last answer is good, and that answer."""

    async def __call__(self) -> T:
        if self._kept is not None and time.monotonic() < self._kept[0]:
            return self._kept[1]
        if self._flight is None:
            self._flight = asyncio.ensure_future(self._ask())
            self._flight.add_done_callback(self._landed)
        # Shielded: a caller that leaves must not end it for the others.
        return await asyncio.shield(self._flight)

    def _landed(self, flight: asyncio.Future[T]) -> None:
        self._flight = None
        if not flight.cancelled() and flight.exception() is None:
            self._kept = time.monotonic() + self._keep_s, flight.result()
