"""Every request has one version of the model, from its first token to its last.

It gets it when it is admitted: `Pinned` chooses and names it in the answer's header and system fingerprint,
`PinnedInputs` writes it into what goes to the engine. There `actors.row_versions` finds it, and the salt keeps what
one version computed from being used for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.neighbours import PINNED, Neighbours
from actors.outages import MANIFEST
from cluster.contexts import context_of
from cluster.live_versions import (
    HEADER,
    LiveVersions,
    assigned,
    chosen,
    computed_by,
    others_for,
    same_engine,
)

_SHORT: Final = 16
PIN: Final = "expertmesh.pin"
"""Of a request's scope: its `Pin`."""
# Paths of requests that no model answers.
_OWN: Final = "/expertmesh/"
# How long a replica may be behind another one with the controller's table.
_HEARD_S: Final = 5.0


@dataclass(eq=False, slots=True)
class Pin:
    """One request's version; another one from when it goes on with that."""

    manifest: str
    context: str = ""
    """Of its request, where requests are shared out."""
    propensity: float | None = None
    """Probability with which it got its version; None where that was not by lot."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A request's version, which only other replicas compute, and their names."""

    manifest: str
    engines: tuple[str, ...]


_of_request: ContextVar[Pin | None] = ContextVar("expertmesh_pin", default=None)


class Pins:
    """The versions that requests get, of one replica of the router."""

    def __init__(self, engine: str = "", lot: Callable[[], float] = random.random) -> None:
        """`engine`: the replica's name among others'; `lot`: a number of 0 to 1."""
        self.engine, self._lot = engine, lot
        self.versions = LiveVersions()
        """What requests get that are admitted now."""
        self._coming: LiveVersions | None = None
        self._inside: set[Pin] = set()
        self.admitted: Counter[str] = Counter()
        """Requests since start, by manifest, of versions that are live."""
        # vLLM writes it into answers; each request's own takes its place, which is as long.
        self.placeholder: Final = f"expertmesh-{secrets.token_hex(_SHORT // 2)}"
        self._open, self._idle, self._changed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()

    def use(self, versions: LiveVersions) -> None:
        """Requests that are admitted from now on get these; those that were held go on."""
        self.versions, self._coming = versions, None
        for gone in self.admitted.keys() - versions.live.keys():
            del self.admitted[gone]
        self._open.set()
        self._changed.set()

    def hold(self, coming: LiveVersions) -> None:
        """Let no request in until `use` with these versions."""
        self._coming = coming
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
            if pin.manifest in continued:
                # Its answer is nobody's alone.
                pin.manifest, pin.propensity = continued[pin.manifest], None

    async def idle(self) -> None:
        """Until no request is inside."""
        await self._idle.wait()

    async def enter(self, who: str, context: str = "") -> Pin | Elsewhere:
        """Let a request of somebody in, at once or when requests are let in again; or say who must have it."""
        while True:
            versions = self._coming or self.versions
            propensity = None
            if versions.shares:
                manifest, propensity = assigned(versions, context, self._lot())
            else:
                manifest = chosen(versions, who)
            if others := others_for(versions, self.engine, manifest):
                return Elsewhere(manifest, others)
            if self._open.is_set():
                return self._let_in(manifest, context, propensity)
            await self._open.wait()

    async def enter_as(self, manifest: str) -> Pin:
        """Let a request in that another replica could not take, with the version that it has, or if this one has not
        heard of that in time, with its own.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARD_S):
                while not self.computes(manifest):
                    self._changed.clear()
                    await self._changed.wait()
        while not self._open.is_set():
            await self._open.wait()
        return self._let_in(manifest if self.computes(manifest) else self.here)

    async def enter_here(self) -> Pin:
        """Let a request in with the version that this replica computes, whatever it is."""
        while not self._open.is_set():
            await self._open.wait()
        return self._let_in(self.here)

    def _let_in(self, manifest: str, context: str = "", propensity: float | None = None) -> Pin:
        pin = Pin(manifest, context if propensity is not None else "", propensity)
        self._inside.add(pin)
        self.admitted[manifest] += 1
        self._idle.clear()
        return pin

    def computes(self, manifest: str) -> bool:
        """Whether what the engine has of its own is this version's as well."""
        return manifest in self.versions.live and same_engine(self.versions, manifest, self.here)

    @property
    def choosing(self) -> bool:
        """Whether it matters whose a request is, or what it is like."""
        versions = self._coming or self.versions
        return bool(versions.candidate or versions.shares)

    @property
    def here(self) -> str:
        """The manifest that this replica computes for whoever asks for none."""
        return computed_by(self.versions, self.engine)

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
        return pin.manifest if pin is not None else self.here


class Pinned:
    """Chooses each request's manifest, and names it in the answer."""

    def __init__(self, app: ASGIApp, pins: Pins, neighbours: Neighbours | None = None) -> None:
        self._app, self._pins, self._neighbours = app, pins, neighbours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pins = self._pins
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith(_OWN):
            await self._app(scope, receive, send)
            return
        if PINNED in scope:
            pin = await pins.enter_as(scope[PINNED])
        else:
            body, who, context, connection = b"", "", "", receive
            if pins.choosing:
                body, receive = await _read(receive)
                who, context = whose(scope, body), context_of(scope["path"], len(body))
            entered = await pins.enter(who, context)
            if isinstance(entered, Elsewhere):
                if not who:
                    # A trial began while it was held.
                    body, receive = await _read(receive)
                if self._neighbours is not None and await self._neighbours.forward(
                    entered, scope, body, connection, send
                ):
                    return
                # Nobody has it any more: better the version that is here than none.
                entered = await pins.enter_here()
            pin = entered
        scope[PIN] = pin
        await self._answer(pin, scope, receive, send)

    async def _answer(self, pin: Pin, scope: Scope, receive: Receive, send: Send) -> None:
        pins = self._pins
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
