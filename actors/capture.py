"""What is kept of requests for learning, from those who agreed to it: beside the requests, and never in their way.

`Capture` copies the bytes of a request and its answer as they pass; a thread makes records of them and writes shards.
What it can't keep up with is dropped and counted.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.api_access import key_digest
from actors.exchanges import CHAT, COMPLETIONS, Exchange, Render, records_of
from actors.neighbours import PINNED
from actors.pinning import PIN
from cluster.errors import ExpertmeshError
from cluster.learning.records import Record, owner
from cluster.live_versions import HEADER
from cluster.messages import CaptureSettings

log = structlog.get_logger()

# Exchanges that wait for the thread, and records that wait for a store which does not answer.
_MOST_WAITING: Final = 1000
_MOST_RECORDS: Final = 10_000
# Of a request and of its answer.
_MOST_BYTES: Final = 1 << 20
# Answers of which users may still say how they like them.
_REMEMBERED: Final = 10_000
_POLL_S: Final = 0.5
_RETRY_S: Final = 10.0
# How often what is too old is looked for.
_EXPIRE_S: Final = 3600.0


class Shards(Protocol):
    """Where records go; see `cluster.learning.stream.Stream`."""

    def append(self, records: Sequence[Record]) -> int: ...
    def expire(self, before: float) -> int: ...


class Recorder:
    """Of one replica of the router."""

    def __init__(
        self,
        settings: CaptureSettings,
        stream: Shards,
        render: Render,
        *,
        clock: Callable[[], float] = time.time,
        lot: Callable[[], float] = random.random,
    ) -> None:
        """`render` makes text of conversations."""
        self._settings, self._stream, self._render = settings, stream, render
        self._expired_at = 0.0
        self._clock, self._lot = clock, lot
        self._waiting: deque[Exchange | Record] = deque()
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._records: list[Record] = []
        self._oldest = self._retry_at = 0.0
        self._stop = threading.Event()
        self.kept = self.dropped = 0
        """Records that were written, and exchanges and records that were not, for want of room or time."""
        self._thread = threading.Thread(target=self._run, name="expertmesh-capture", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write what there is, and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def owner_of(self, headers: Headers) -> str | None:
        """Under which name a request is to be kept; None if it is not."""
        _, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip()
        # Clients of a server that asks for no key send one that means nothing.
        agreed = self._settings.without_key or key_digest(key) in self._settings.digests
        return owner(key) if agreed and self._lot() < self._settings.share else None

    def put(self, exchange: Exchange) -> None:
        """Keep this one, unless too many are waiting."""
        self._put(exchange)

    def liked(self, answer_id: str, score: float) -> bool:
        """A user says how an answer was; of answers that are not kept nothing is kept either. Whether it was."""
        if (key := self._answers.get(answer_id)) is None:
            return False
        self._put(Record("feedback", answer_id, self._clock(), key, score=score))
        return True

    def _put(self, item: Exchange | Record) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self.dropped += 1
        else:
            self._waiting.append(item)

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self.take()
        self.take()
        self._write(time.monotonic())

    def take(self) -> None:
        """Make records of what is waiting, and a shard of them if it is time."""
        now = time.monotonic()
        while self._waiting:
            item = self._waiting.popleft()
            made = [item] if isinstance(item, Record) else self._made(item)
            if len(self._records) + len(made) > _MOST_RECORDS:
                self.dropped += len(made)
                continue
            if made and not self._records:
                self._oldest = now
            self._records += made
        full = len(self._records) >= self._settings.shard_records
        old = now - self._oldest >= self._settings.shard_age_s
        if self._records and (full or old) and now >= self._retry_at:
            self._write(now)

    def _made(self, exchange: Exchange) -> list[Record]:
        made = records_of(exchange, self._render, self._settings.domain, self._settings.consent)
        for record in made:
            self._answers[record.id] = record.key
            if len(self._answers) > _REMEMBERED:
                self._answers.popitem(last=False)
        return made

    def _write(self, now: float) -> None:
        if not self._records:
            return
        try:
            self._stream.append(self._records)
            if now - self._expired_at > _EXPIRE_S:
                self._stream.expire(self._clock() - self._settings.retention_s)
                self._expired_at = now
        except ExpertmeshError as error:
            log.warning("the stream can't be written", reason=error.message, waiting=len(self._records))
            self._retry_at = now + _RETRY_S
            return
        self.kept += len(self._records)
        self._records = []


class Capture:
    """Copies requests of those who agreed, and their answers, for a recorder."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app, self._recorder = app, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What another replica hands on it keeps itself.
        if scope["type"] != "http" or scope["path"] not in (COMPLETIONS, CHAT) or PINNED in scope:
            await self._app(scope, receive, send)
            return
        key = self._recorder.owner_of(Headers(scope=scope))
        if key is None:
            await self._app(scope, receive, send)
            return
        request, response = _Copy(), _Copy()
        headers = Headers()
        status, at = 0, time.time()

        async def heard() -> Message:
            message = await receive()
            request.add(message.get("body", b""))
            return message

        async def said(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            else:
                response.add(message.get("body", b""))
            await send(message)

        await self._app(scope, heard, said)
        if status == 200 and request.whole and response.whole:
            streamed = headers.get("content-type", "").startswith("text/event-stream")
            pin = scope.get(PIN)
            self._recorder.put(
                Exchange(
                    scope["path"],
                    at,
                    key,
                    headers.get(HEADER, ""),
                    request.data,
                    response.data,
                    streamed,
                    pin.context if pin is not None else "",
                    pin.propensity if pin is not None else None,
                )
            )


class _Copy:
    """Bytes as they pass, up to a bound."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self.whole:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    @property
    def whole(self) -> bool:
        return self._size <= _MOST_BYTES

    @property
    def data(self) -> bytes:
        return b"".join(self._pieces)
