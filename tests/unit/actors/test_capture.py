"""What is kept of requests: whole answers of those who agreed, and never in a request's way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from actors import capture as capture_module
from actors.api_access import key_digest
from actors.capture import Capture, Recorder
from actors.exchanges import CHAT, COMPLETIONS, Exchange, records_of
from actors.neighbours import PINNED
from actors.pinning import PIN, Pin
from cluster.errors import StoreError
from cluster.learning.records import Record, owner
from cluster.learning.stream import Stream
from cluster.live_versions import HEADER
from cluster.messages import CaptureSettings, StoreAddress

SETTINGS = CaptureSettings(
    StoreAddress("memory://x"), (key_digest("mine"),), False, 1.0, "terms", "traffic", 3, 60.0, 1000.0
)


def render(messages: list[dict[str, Any]]) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


STREAM = event(text="one ") + event(text="two", finish_reason="length") + b"data: [DONE]\n\n"
CHAT_STREAM = (
    event(delta={"role": "assistant", "content": ""})
    + event(delta={"content": "yes"})
    + event(delta={}, finish_reason="stop")
    + b'data: {"id": "cmpl-1", "choices": [], "usage": {}}\n\ndata: [DONE]\n\n'
)
TALK = {"messages": [{"role": "user", "content": "is it?"}]}


def made(path: str, request: Any, response: bytes, streamed: bool = True) -> list[tuple[str, str, str]]:
    exchange = Exchange(path, 5.0, "k", "m", json.dumps(request).encode(), response, streamed)
    found = records_of(exchange, render, "traffic", "terms")
    for record in found:
        assert (record.kind, record.at, record.key, record.manifest) == ("request", 5.0, "k", "m")
        assert (record.domain, record.consent) == ("traffic", "terms")
    return [(record.id, record.prompt, record.answer) for record in found]


def choices(*texts: str, reason: str = "stop", **more: Any) -> bytes:
    found = [{"index": n, "text": text, "finish_reason": reason} for n, text in enumerate(texts)]
    return json.dumps({"id": "cmpl-1", "choices": found, **more}).encode()


def test_answers_become_records() -> None:
    assert made(COMPLETIONS, {"prompt": "say "}, STREAM) == [("cmpl-1", "say ", "one two")]
    assert made(CHAT, TALK, CHAT_STREAM) == [("cmpl-1", "<user>is it?", "yes")]
    whole = {"id": "c", "choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]}
    assert made(CHAT, TALK, json.dumps(whole).encode(), False) == [("c", "<user>is it?", "yes")]
    several = made(COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, choices("1", "2", "3", "4"), False)
    assert several == [
        ("cmpl-1", "a", "1"),
        ("cmpl-1#1", "a", "2"),
        ("cmpl-1#2", "b", "3"),
        ("cmpl-1#3", "b", "4"),
    ]


@pytest.mark.parametrize(
    ("request_", "response", "streamed"),
    [
        ({"prompt": "a"}, STREAM.replace(b"data: [DONE]", b""), True),
        ({"prompt": "a"}, STREAM.replace(b"length", b"abort"), True),
        ({"prompt": "a"}, STREAM.replace(b'{"id"', b'{"expertmesh": {}, "id"', 1), True),
        ({"prompt": "a"}, STREAM[:30], True),
        ({"prompt": [1, 2, 3]}, STREAM, True),
        ({"prompt": "a", "echo": True}, STREAM, True),
        ({"prompt": "a"}, choices("x", reason="abort"), False),
        ({"prompt": "a"}, choices("x", expertmesh={"degraded": "no"}), False),
        ({"prompt": "a"}, b"{}", False),
        ({"prompt": "a"}, b"[]", False),
        ({}, choices("x"), False),
        ([], choices("x"), False),
    ],
)
def test_what_is_not_whole_or_no_text_is_left_out(request_: Any, response: bytes, streamed: bool) -> None:
    assert made(COMPLETIONS, request_, response, streamed) == []


class Shards:
    def __init__(self) -> None:
        self.written: list[list[Record]] = []
        self.fails = False
        self.expired: list[float] = []

    def expire(self, before: float) -> int:
        self.expired.append(before)
        return 0

    def append(self, records: Sequence[Record]) -> int:
        if self.fails:
            raise StoreError("no room", "make some")
        self.written.append(list(records))
        return len(self.written)


def exchange(number: int) -> Exchange:
    answer = json.dumps(
        {"id": f"cmpl-{number}", "choices": [{"index": 0, "text": "t", "finish_reason": "stop"}]}
    ).encode()
    return Exchange(COMPLETIONS, 1.0, "k", "m", b'{"prompt": "p"}', answer, False)


def recorder(shards: Shards, **more: Any) -> Recorder:
    return Recorder(SETTINGS, shards, render, **more)


def test_shards_are_written_when_they_are_full_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, now = Shards(), 100.0
    monkeypatch.setattr(capture_module.time, "monotonic", lambda: now + 1e6)
    kept = recorder(shards, clock=lambda: 5000.0)
    kept.put(exchange(1))
    kept.take()
    assert shards.written == [] and kept.liked("cmpl-1", 0.5) and not kept.liked("cmpl-9", 0.5)
    kept.put(exchange(2))
    kept.take()
    ((first, said, second),) = shards.written
    assert (first.id, second.id) == ("cmpl-1", "cmpl-2")
    assert (said.kind, said.id, said.key, said.score) == ("feedback", "cmpl-1", "k", 0.5)
    kept.put(exchange(3))
    kept.take()
    now += 59.0
    kept.take()
    assert len(shards.written) == 1
    now += 2.0
    kept.take()
    assert len(shards.written) == 2 and (kept.kept, kept.dropped) == (4, 0)
    assert shards.expired == [4000.0], "once an hour"


def test_a_store_without_room_costs_nothing_but_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, now = Shards(), 100.0
    shards.fails = True
    monkeypatch.setattr(capture_module.time, "monotonic", lambda: now + 1e6)
    monkeypatch.setattr(capture_module, "_MOST_WAITING", 5)
    monkeypatch.setattr(capture_module, "_MOST_RECORDS", 6)
    kept = recorder(shards)
    for number in range(7):
        kept.put(exchange(number))
    assert kept.dropped == 2, "too many at a time"
    kept.take()
    for number in range(3):
        kept.put(exchange(number))
    kept.take()
    assert kept.dropped == 4, "and too many in all"
    shards.fails = False
    now += 1.0
    kept.take()
    assert shards.written == [], "it is not asked all the time"
    now += 100.0
    kept.take()
    assert [len(shard) for shard in shards.written] == [6] and kept.kept == 6


def test_a_thread_writes_and_ends_with_all_that_there_is(tmp_path: Path) -> None:
    stream = Stream(str(tmp_path))
    kept = Recorder(SETTINGS, stream, render)
    kept.start()
    kept.put(exchange(1))
    kept.stop()
    kept.stop()
    assert [record.id for _, shard in stream.after(0) for record in shard] == ["cmpl-1"]


def test_only_who_agreed_is_kept() -> None:
    kept = recorder(Shards())
    assert kept.owner_of(Headers({"authorization": "Bearer mine"})) == owner("mine")
    assert kept.owner_of(Headers({"authorization": "Bearer other"})) is None
    assert kept.owner_of(Headers()) is None
    lots = iter([0.4, 0.6, 0.4])
    some = Recorder(
        CaptureSettings(StoreAddress("memory://x"), (), True, 0.5, "terms", "traffic", 3, 60.0, 1000.0),
        Shards(),
        render,
        lot=lambda: next(lots),
    )
    assert some.owner_of(Headers()) == owner("") and some.owner_of(Headers()) is None
    assert some.owner_of(Headers({"authorization": "Bearer none"})) == owner("none"), "which nobody asked for"


@pytest.mark.parametrize(
    ("changes", "status", "body", "count"),
    [
        ({}, 200, STREAM, 1),
        ({"path": "/v1/embeddings"}, 200, STREAM, 0),
        ({PINNED: "m"}, 200, STREAM, 0),
        ({"headers": []}, 200, STREAM, 0),
        ({}, 503, STREAM, 0),
        ({}, 200, STREAM + b"x" * 2000, 0),
    ],
)
def test_a_request_passes_through_and_is_copied(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], status: int, body: bytes, count: int
) -> None:
    monkeypatch.setattr(capture_module, "_MOST_BYTES", 1000)
    put: list[Exchange] = []
    kept = recorder(Shards())
    monkeypatch.setattr(kept, "put", put.append)
    sent: list[Message] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b'{"prompt": "p"}'
        scope[PIN] = Pin("m", "text/short", 0.25)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (HEADER.encode(), b"m")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for start in range(0, len(body), 40):
            await send({"type": "http.response.body", "body": body[start : start + 40], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"prompt": "p"}'}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": COMPLETIONS, "headers": [(b"authorization", b"Bearer mine")], **changes}
    asyncio.run(Capture(application, kept)(scope, receive, send))
    assert b"".join(message.get("body", b"") for message in sent) == body
    assert len(put) == count
    if count:
        (found,) = put
        assert (found.manifest, found.response, found.streamed, found.key) == ("m", body, True, owner("mine"))
        (record,) = records_of(found, render, "traffic", "terms")
        assert (record.context, record.propensity) == ("text/short", 0.25)
