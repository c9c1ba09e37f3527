"""How many requests are let in and how long each may take, on a small application in vLLM's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message

from actors import admission
from actors.admission import Admission


class Model:
    """An application that answers when it is told to, and remembers how its requests ended."""

    def __init__(self) -> None:
        self.go, self.begun = asyncio.Event(), asyncio.Event()
        self.ended: list[str] = []
        self.app = FastAPI()

        @self.app.post("/whole")
        async def whole(request: Request) -> JSONResponse:
            self.begun.set()
            # As vLLM does it: a disconnect ends the work, a cancellation of this task would not.
            gone = asyncio.create_task(_disconnect(request))
            work = asyncio.create_task(self.go.wait())
            done, pending = await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            self.ended.append("answered" if work in done else "disconnected")
            return JSONResponse({"text": "whole"})

        @self.app.post("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self._events(), media_type="text/event-stream")

        @self.app.post("/broken")
        async def broken() -> None:
            raise RuntimeError("bug")

        @self.app.get("/health")
        async def health() -> dict[str, str]:
            return {}

    async def _events(self) -> AsyncIterator[str]:
        try:
            yield "data: 1\n\n"
            self.begun.set()
            await self.go.wait()
            yield "data: [DONE]\n\n"
            self.ended.append("answered")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def client(app: Admission) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def run(test: Callable[[Model], Awaitable[None]]) -> None:
    async def call() -> None:
        await asyncio.wait_for(test(Model()), 20)

    asyncio.run(call())


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_more_than_the_limit_are_refused_at_once_and_others_let_in_after(path: str) -> None:
    async def test(model: Model) -> None:
        app = Admission(model.app, limit=2, timeout_s=20)
        async with client(app) as http:
            first = [asyncio.create_task(http.post(path)) for _ in range(2)]
            while app.admitted < 2:
                await asyncio.sleep(0.001)
            refused = await http.post(path)
            assert refused.status_code == 429
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert "2 requests" in error["message"]
            # Probes and lists are answered all the same.
            assert (await http.get("/health")).status_code == 200
            model.go.set()
            assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
            assert (await http.post(path)).status_code == 200
        assert app.admitted == 0

    run(test)


def test_a_request_past_its_time_is_ended_with_an_error() -> None:
    async def test(model: Model) -> None:
        app = Admission(model.app, limit=2, timeout_s=0.05)
        async with client(app) as http:
            answer = await http.post("/whole")
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        assert "0.05 s" in answer.json()["error"]["message"]
        assert model.ended == ["disconnected"]
        assert app.admitted == 0

    run(test)


def test_a_stream_past_its_time_ends_with_an_error_event() -> None:
    async def test(model: Model) -> None:
        app = Admission(model.app, limit=2, timeout_s=0.05)
        async with client(app) as http:
            answer = await http.post("/stream")
        assert answer.status_code == 200
        first, last, rest = answer.text.split("\n\n")
        assert (first, rest) == ("data: 1", "")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert model.ended == ["cancelled"]
        assert app.admitted == 0

    run(test)


def test_who_ignores_the_end_of_the_time_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_END_S", 0.05)
    ended: list[str] = []

    async def deaf(scope: object, receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def test(model: Model) -> None:
        app = Admission(deaf, limit=1, timeout_s=0.05)
        async with client(app) as http:
            assert (await http.post("/whole")).status_code == 504
        assert ended == ["cancelled"] and app.admitted == 0

    run(test)


def test_a_client_that_leaves_is_told_to_the_application_and_its_place_is_free() -> None:
    async def test(model: Model) -> None:
        app = Admission(model.app, limit=1, timeout_s=20)
        messages: list[Message] = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/whole", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        assert model.ended == ["disconnected"] and app.admitted == 0

    run(test)


@pytest.mark.parametrize(("path", "end"), [("/whole", "disconnected"), ("/stream", "cancelled")])
def test_a_cancelled_request_ends_its_work_and_leaves_its_place(path: str, end: str) -> None:
    async def test(model: Model) -> None:
        app = Admission(model.app, limit=1, timeout_s=20)
        async with client(app) as http:
            request = asyncio.create_task(http.post(path))
            await model.begun.wait()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        assert model.ended == [end] and app.admitted == 0

    run(test)


def test_a_broken_request_leaves_its_place() -> None:
    async def test(model: Model) -> None:
        app = Admission(model.app, limit=1, timeout_s=20)
        async with client(app) as http:
            with pytest.raises(RuntimeError, match="bug"):
                await http.post("/broken")
        assert app.admitted == 0

    run(test)
