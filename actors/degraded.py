"""What the HTTP answer says of experts that were not there: 503 with Retry-After, or that it was degraded."""

from __future__ import annotations

import json
import re
from collections.abc import MutableMapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_AFTER_S = 5
"""A host process is back within seconds; one that moves to another node takes as long as it loads."""
_ID = re.compile(rb'"id":\s*"([^"]+)"')
_DONE = b"data: [DONE]"


class Unavailable:
    """Gives every 503 a Retry-After header, and a stream whose first event is an error that error's status.

    A stream that an error ends later has no [DONE], which vLLM would send all the same.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: Message | None = None
        stream = replaced = broken = False

        async def answer(message: Message) -> None:
            nonlocal held, stream, replaced, broken
            if replaced:
                return
            if message["type"] == "http.response.start":
                if message["status"] == 503:
                    MutableHeaders(raw=message["headers"])["retry-after"] = str(RETRY_AFTER_S)
                stream = _is_stream(message) and message["status"] == 200
                if stream:
                    # Until the first event is there: a status can't be taken back.
                    held = message
                    return
            elif stream:
                start, held = held, None
                body = message.get("body", b"")
                error = _error(body)
                if error is not None and start is not None:
                    replaced = True
                    code = error["error"].get("code")
                    status = code if isinstance(code, int) else 500
                    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else None
                    await JSONResponse(error, status, headers)(scope, receive, send)
                    return
                if start is not None:
                    await send(start)
                broken = broken or error is not None
                if broken and _DONE in body:
                    message = {**message, "body": body[: body.index(_DONE)]}
            await send(message)

        await self._app(scope, receive, answer)


class Degraded:
    """Adds `"expertmesh": {"degraded": reason}` to answers of requests in `marks`, by request id.

    A stream gets it in an event of its own before the last.
    """

    def __init__(self, app: ASGIApp, marks: MutableMapping[str, str]) -> None:
        self._app = app
        self._marks = marks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        stream = False
        start: Message | None = None
        body, name = b"", ""

        async def answer(message: Message) -> None:
            nonlocal stream, start, body, name
            if message["type"] == "http.response.start":
                stream = _is_stream(message)
                if not stream and self._marks:
                    start = message
                    return
            elif stream:
                if not name and (found := _ID.search(message.get("body", b""))):
                    name = found[1].decode()
                if self._marks and _DONE in message.get("body", b""):
                    reason = self._take(name)
                    if reason is not None:
                        event = {"id": name, "choices": [], "expertmesh": {"degraded": reason}}
                        told = f"data: {json.dumps(event)}\n\n".encode()
                        message = {**message, "body": message["body"].replace(_DONE, told + _DONE)}
            elif start is not None:
                body += message.get("body", b"")
                if message.get("more_body", False):
                    return
                found = _ID.search(body)
                reason = self._take(found[1].decode()) if found else None
                if reason is not None:
                    body = json.dumps({**json.loads(body), "expertmesh": {"degraded": reason}}).encode()
                    MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
                await send(start)
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self._app(scope, receive, answer)

    def _take(self, name: str) -> str | None:
        """The reason for one answer; a request with several prompts has marks with a suffix each."""
        reasons = [
            self._marks.pop(mark) for mark in list(self._marks) if mark == name or mark.startswith(f"{name}-")
        ]
        return reasons[0] if reasons else None


def _is_stream(message: Message) -> bool:
    return Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")


def _error(event: bytes) -> dict[str, dict[str, object]] | None:
    """The error that a stream's first event tells, if it does."""
    text = event.split(b"\n", 1)[0].removeprefix(b"data: ")
    if not text.startswith(b'{"error"'):
        return None
    try:
        return dict(json.loads(text))
    except ValueError:
        return None
