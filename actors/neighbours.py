"""Other replicas of the router, for requests whose version this one's engine can't compute.

Each replica listens on a port of its own besides the one that all share, and takes there what another replica hands
on, with the manifest that it is pinned to. A request on it must name that under a key that only processes of this
cluster have; what it says to API keys is looked at again as on any other.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha256
from typing import Any, Final, Protocol

import httpx
import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger()

PINNED: Final = "expertmesh.pinned"
"""Key of a scope with the manifest of a request that another replica has handed on."""
NATS: Final = "/expertmesh/nats"
"""How little the engine expects a text; asked by other replicas only."""
_HEADER: Final = "x-expertmesh-pinned"
# For what is no answer of the model's.
_POST_S: Final = 60.0
# Of one connection, or what the server on either end writes itself.
_NOT_HANDED_ON: Final = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"host", b"date", b"server", _HEADER.encode()}
)


class Request(Protocol):
    """What is handed on; see `actors.pinning.Elsewhere`."""

    @property
    def manifest(self) -> str: ...
    @property
    def engines(self) -> tuple[str, ...]: ...


def engine_name(random: str, host: str, port: int) -> str:
    """What a replica is called: by it others find where it listens."""
    return f"{random}@{f'[{host}]' if ':' in host else host}:{port}"


class Neighbours:
    """The client's side, used in the router's event loop."""

    def __init__(self, key: Callable[[], bytes]) -> None:
        """`key` gives what all replicas of the cluster have, when it is needed."""
        self._key = key
        self._client: httpx.AsyncClient | None = None

    async def forward(
        self, request: Request, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> bool:
        """Have the first of the engines that is there answer; False if none is, and nothing was sent. The body has been
        received already.

        What breaks in mid-answer is raised, so that the client sees it as well.
        """
        for engine in request.engines:
            if await self._ask(engine, request.manifest, scope, body, receive, send):
                return True
        return False

    async def post(
        self, engine: str, path: str, manifest: str, content: dict[str, Any], authorization: str = ""
    ) -> httpx.Response:
        """Ask another replica something; of what is everybody's, with what its client shows of API keys."""
        headers = {_HEADER: proven(self._key(), manifest)}
        if authorization:
            headers["authorization"] = authorization
        return await self._opened().post(_url(engine, path), json=content, headers=headers, timeout=_POST_S)

    def _opened(self) -> httpx.AsyncClient:
        if self._client is None:
            limits = httpx.Limits(max_connections=None)
            # None of the proxies that the environment names, and no end to an answer.
            self._client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)
        return self._client

    async def _ask(
        self, engine: str, manifest: str, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> bool:
        begun = False

        async def started(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        asked = asyncio.create_task(self._relay(engine, manifest, scope, body, started))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return True  # the client has gone; its work there ends with the connection
            await asked
        except httpx.HTTPError as error:
            if begun:
                raise
            log.warning("another replica can't be asked", engine=engine, reason=str(error) or repr(error))
            return False
        finally:
            for task in (asked, left):
                task.cancel()
            await asyncio.gather(asked, left, return_exceptions=True)
        return True

    async def _relay(self, engine: str, manifest: str, scope: Scope, body: bytes, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_HANDED_ON]
        headers.append((_HEADER.encode(), proven(self._key(), manifest).encode()))
        query = scope.get("query_string", b"").decode("latin-1")
        url = _url(engine, scope["path"]) + (f"?{query}" if query else "")
        async with self._opened().stream(scope["method"], url, headers=headers, content=body) as response:
            back = [(name.lower(), value) for name, value in response.headers.raw]
            back = [(name, value) for name, value in back if name not in _NOT_HANDED_ON]
            await send({"type": "http.response.start", "status": response.status_code, "headers": back})
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class HandedOn:
    """The server's side: what other replicas send, and nothing else, goes to the application."""

    def __init__(self, app: ASGIApp, key: bytes, nats: Callable[[list[int], str], Awaitable[float]]) -> None:
        """`nats` says how little the version of this manifest expects a text."""
        self._app, self._key, self._nats = app, key, nats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        manifest = checked(self._key, Headers(scope=scope).get(_HEADER, ""))
        if manifest is None:
            await PlainTextResponse("for other replicas of the router", 403)(scope, receive, send)
            return
        if scope["path"] == NATS:
            tokens = json.loads(await _whole(receive))["tokens"]
            await JSONResponse({"nats": await self._nats(tokens, manifest)})(scope, receive, send)
            return
        await self._app({**scope, PINNED: manifest}, receive, send)


def proven(key: bytes, manifest: str) -> str:
    """The header's value: a manifest, and that whoever names it has the key."""
    return f"{manifest}:{hmac.new(key, manifest.encode(), sha256).hexdigest()}"


def checked(key: bytes, value: str) -> str | None:
    """The manifest of a header's value; None if it does not show that its sender has the key."""
    manifest = value.partition(":")[0]
    shown = value.encode("latin-1", "replace")
    return (
        manifest if hmac.compare_digest(shown, proven(key, manifest).encode("latin-1", "replace")) else None
    )


def others(engines: Collection[str], own: str) -> list[str]:
    """All but this one."""
    return [name for name in engines if name != own]


def _url(engine: str, path: str) -> str:
    return f"http://{engine.partition('@')[2]}{path}"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body
