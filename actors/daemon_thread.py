"""Calls that may block for long, made from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


async def in_daemon_thread(call: Callable[[], _T]) -> _T:
    """The result of a call that may block for long. An executor's threads are waited for when the process ends,
    which would keep a replica alive for as long as the call takes after everything else is gone."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def settle(end: Callable[[], None]) -> None:
        if not result.done():
            end()

    def run() -> None:
        try:
            end = partial(result.set_result, call())
        except Exception as error:
            end = partial(result.set_exception, error)
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, end)

    threading.Thread(target=run, name="expertmesh-call", daemon=True).start()
    return await result
