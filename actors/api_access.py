"""Who may call the API, which of vLLM's routes are offered, and errors in OpenAI's shape."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config_values import is_loopback

# Probes of load balancers and kubelets carry no key; they tell nothing but up or down.
_OPEN_PATHS = frozenset({"/health", "/ready"})
_ROLES = frozenset({"developer", "system", "user", "assistant", "tool", "function"})
# vLLM's application also has routes that scale, profile and tokenise for other products; this is what
# expertmesh promises, and nothing that changes the engine is reachable from outside.
_OFFERED = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/version",
    "/openapi.json",
    "/docs",
    "/redoc",
)


def keep_listed_routes(app: FastAPI) -> None:
    """Take every route off that is not offered."""
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if any(
            getattr(route, "path", "") == path or getattr(route, "path", "").startswith(path + "/")
            for path in _OFFERED
        )
    ]


def key_digest(key: str) -> str:
    """sha256 hex of an API key: the replica compares digests and never holds the keys."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """401 to every request without a known bearer key, but to open paths, which are those of probes by default.

    `refusal` is what is answered; without it an error in OpenAI's shape.
    """

    def __init__(
        self,
        app: ASGIApp,
        digests: tuple[str, ...],
        open_paths: Collection[str] = _OPEN_PATHS,
        refusal: ASGIApp | None = None,
    ) -> None:
        self._app = app
        self._digests, self._open_paths = digests, open_paths
        self._refusal = refusal or error_response(
            401, "invalid API key", "authentication_error", "invalid_api_key"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        await self._refusal(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = key_digest(key.strip())
        # Every digest is compared, so that the time taken does not tell which one came close.
        return any([hmac.compare_digest(digest, known) for known in self._digests])


class OwnPagesOnly:
    """`refusal` to what a page of another site sends: for an API that asks for no key, and so listens on this machine
    alone, but on which any browser here would call it in its user's name.

    A site whose name was made to point at this machine is told by the host that is asked for.
    """

    def __init__(self, app: ASGIApp, refusal: ASGIApp) -> None:
        self._app, self._refusal = app, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = scope["type"] != "http" or _is_own(Headers(scope=scope))
        await (self._app if own else self._refusal)(scope, receive, send)


def _is_own(headers: Headers) -> bool:
    """Whether it is asked by a name of this machine's, and not from a page under another."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "") and (
            origin is None or urlsplit(origin).netloc == host
        )
    except ValueError:
        return False


class OpenAIErrors:
    """Unknown paths and wrong methods answer in OpenAI's error shape as well, not in Starlette's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] in (404, 405):
                kind = Headers(raw=message["headers"]).get("content-type", "")
                length = Headers(raw=message["headers"]).get("content-length", "")
                # Starlette's own two bodies: {"detail":"Not Found"} and {"detail":"Method Not Allowed"}.
                if kind == "application/json" and length in ("22", "31"):
                    replaced = True
                    text = "unknown path" if message["status"] == 404 else "method not allowed on"
                    response = error_response(
                        message["status"], f"{text} {scope['path']}", "invalid_request_error", None
                    )
                    await response(scope, receive, send)
                    return
            if not replaced:
                await send(message)

        await self._app(scope, receive, answer)


class KnownRoles:
    """400 to a chat message whose role OpenAI doesn't know: vLLM would hand it to the chat template."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/chat/completions" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        wrong = unknown_role(body)
        if wrong is not None:
            text = f"messages: {wrong!r} is no role; known are {', '.join(sorted(_ROLES))}"
            await error_response(400, text, "invalid_request_error", "invalid_role")(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


def unknown_role(body: bytes) -> object | None:
    """The first role in a chat request that is none of OpenAI's; other mistakes are vLLM's to refuse."""
    try:
        messages = json.loads(body)["messages"]
        roles = [message["role"] for message in messages]
    except (ValueError, TypeError, KeyError):
        return None
    return next((role for role in roles if not isinstance(role, str) or role not in _ROLES), None)


def error_response(status: int, message: str, kind: str, code: str | None) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse(error_body(message, kind, code), status)


def error_body(message: str, kind: str, code: str | None) -> dict[str, dict[str, str | None]]:
    """What OpenAI's API says of a mistake: the body of the answer, or an event of a stream."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
