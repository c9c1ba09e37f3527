"""Admission: how many requests an engine takes at the same time, and how long each may take.

vLLM queues without end. Here a request beyond the limit is refused at once, so that its client can turn
elsewhere, and one past its time is ended with an error and leaves the engine.
"""

from __future__ import annotations

import asyncio
import json

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.api_access import error_body, error_response

# How long an application may take to leave after it was told that its client is gone.
_END_S = 1.0


class Admission:
    """Lets `limit` requests in, each for `timeout_s` seconds. Only POST counts: the rest asks no engine."""

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s = timeout_s
        self.admitted = 0
        """Requests inside now."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self.admitted >= self._limit:
            text = f"{self.admitted} requests are running or waiting, which is the most; try again later"
            await error_response(429, text, "rate_limit_error", "queue_full")(scope, receive, send)
            return
        self.admitted += 1
        try:
            await self._within_time(scope, receive, send)
        finally:
            self.admitted -= 1

    async def _within_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        over = asyncio.Event()
        stream: bool | None = None
        """Whether the answer is one of events; None while there is no answer."""

        async def listen() -> Message:
            # vLLM ends its work when it reads that the client is gone; cancelling its handler would leave
            # the work running, since the handler merely waits for it.
            message, expired = asyncio.ensure_future(receive()), asyncio.ensure_future(over.wait())
            try:
                await asyncio.wait({message, expired}, return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                expired.cancel()

        async def answer(message: Message) -> None:
            nonlocal stream
            if over.is_set():
                return
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                stream = kind.startswith("text/event-stream")
            await send(message)

        task = asyncio.ensure_future(self._app(scope, listen, answer))
        try:
            await asyncio.wait({task}, timeout=self._timeout_s)
            if task.done():
                task.result()
                return
            over.set()
            text = f"the request took longer than {self._timeout_s:g} s"
            if stream is None:
                await error_response(504, text, "timeout_error", "timeout")(scope, receive, send)
            elif stream:
                event = f"data: {json.dumps(error_body(text, 'timeout_error', 'timeout'))}\n\n"
                await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        finally:
            # Serve cancels this call when a client leaves: that must end the work as well.
            over.set()
            if stream is None:
                await asyncio.wait({task}, timeout=_END_S)
            task.cancel()
            await asyncio.wait({task}, timeout=_END_S)
            if task.done() and not task.cancelled():
                task.exception()  # looked at, or asyncio would report one that nobody waits for
