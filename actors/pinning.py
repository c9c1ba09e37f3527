"""Every request has one version of the model, from its first token to its last.

It gets it when it is admitted: `Pinned` chooses and names it in the answer's header and system fingerprint,
`PinnedInputs` writes it into what goes to the engine. There `actors.row_versions` finds it, and the salt keeps what
one version computed from being used for another.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.outages import MANIFEST
from cluster.live_versions import HEADER, LiveVersions, chosen

_SHORT: Final = 16


@dataclass(eq=False, slots=True)
class Pin:
    """One request's version; another one from when it goes on with that."""

    manifest: str


_of_request: ContextVar[Pin | None] = ContextVar("expertmesh_pin", default=None)


class Pins:
    """The versions that requests get, of one replica of the router."""

    def __init__(self) -> None:
        self.versions = LiveVersions()
        """What requests get that are admitted now."""
        self._inside: set[Pin] = set()
        self.admitted: Counter[str] = Counter()
        """Requests since start, by manifest, of versions that are live."""
        # vLLM writes it into answers; each request's own takes its place, which is as long.
        self.placeholder: Final = f"expertmesh-{secrets.token_hex(_SHORT // 2)}"
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()

    def use(self, versions: LiveVersions) -> None:
        """Requests that are admitted from now on get these; those that were held go on."""
        self.versions = versions
        for gone in self.admitted.keys() - versions.live.keys():
            del self.admitted[gone]
        self._open.set()

    def hold(self) -> None:
        """Let no request in until `use`."""
        self._open.clear()

    @property
    def running(self) -> Counter[str]:
        """Requests inside, by manifest."""
        return Counter(pin.manifest for pin in self._inside)

    @property
    def busy(self) -> bool:
        """Whether any request is inside."""
        return bool(self._inside)

    def go_on(self, continued: Mapping[str, str]) -> None:
        """Requests inside go on with other versions: by manifest, the one that takes its place."""
        for pin in self._inside:
            pin.manifest = continued.get(pin.manifest, pin.manifest)

    async def idle(self) -> None:
        """Until no request is inside."""
        await self._idle.wait()

    async def enter(self, who: str) -> Pin:
        """Let a request of somebody in, at once or when requests are let in again."""
        while not self._open.is_set():
            await self._open.wait()
        pin = Pin(chosen(self.versions, who))
        self._inside.add(pin)
        self.admitted[pin.manifest] += 1
        self._idle.clear()
        return pin

    def leave(self, pin: Pin) -> None:
        """The request has ended."""
        self._inside.remove(pin)
        if not self._inside:
            self._idle.set()

    def current(self) -> str:
        """The manifest of the request that is being handled; of one that was not admitted, such as a probe, the
        one that serves.
        """
        pin = _of_request.get()
        return pin.manifest if pin is not None else self.versions.serving


class Pinned:
    """Chooses each request's manifest, and names it in the answer."""

    def __init__(self, app: ASGIApp, pins: Pins) -> None:
        self._app, self._pins = app, pins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pins = self._pins
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        who = ""
        if pins.versions.candidate:
            body, receive = await _read(receive)
            who = whose(scope, body)
        pin = await pins.enter(who)
        placeholder = pins.placeholder.encode()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and pin.manifest:
                MutableHeaders(raw=message["headers"])[HEADER] = pin.manifest
            elif placeholder in message.get("body", b""):
                body = message["body"].replace(placeholder, fingerprint(pin.manifest))
                message = {**message, "body": body}
            await send(message)

        token = _of_request.set(pin)
        try:
            await self._app(scope, receive, answer)
        finally:
            pins.leave(pin)
            _of_request.reset(token)


@contextmanager
def pinned_to(manifest: str) -> Iterator[None]:
    """Requests of this block are of a version, whatever serves."""
    token = _of_request.set(Pin(manifest))
    try:
        yield
    finally:
        _of_request.reset(token)


def whose(scope: Scope, body: bytes) -> str:
    """Whose request it is: the user that it names, else the API key, else its own."""
    try:
        user = json.loads(body)["user"]
    except (ValueError, KeyError, TypeError):
        user = None
    if isinstance(user, str) and user:
        return f"user {user}"
    key = Headers(scope=scope).get("authorization", "")
    return f"key {key}" if key else secrets.token_hex(8)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The request's body, and what gives the application the same messages again."""
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body", False):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    left = iter(messages)

    async def again() -> Message:
        return next(left, None) or await receive()

    return body, again


class PinnedInputs:
    """vLLM's processor of inputs, which names each request's manifest to the engine and salts its cache with it."""

    def __init__(self, inner: Any, pins: Pins) -> None:
        self._inner, self._pins = inner, pins

    def process_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        return self._pin(self._inner.process_inputs(*args, **kwargs))

    async def process_inputs_async(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        return self._pin(await self._inner.process_inputs_async(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _pin(self, request: Any) -> Any:
        manifest = self._pins.current()
        if manifest:
            request.cache_salt = salt(manifest, request.cache_salt)
            params = request.sampling_params
            if params is not None:
                params.extra_args = {**(params.extra_args or {}), MANIFEST: manifest}
        return request


def fingerprint(manifest: str) -> bytes:
    """What an answer of this version has as its system fingerprint."""
    return f"expertmesh-{manifest[:_SHORT]}".encode()


def salt(manifest: str, of_client: str | None) -> str:
    """What a request's cache is salted with: its manifest, and what its client asked for."""
    return f"{manifest}:{of_client or ''}"


def salted_anew(before: str | None, manifest: str) -> str:
    """The salt of a request that goes on with another manifest."""
    return salt(manifest, (before or "").partition(":")[2])
