"""Requests handed on from one replica of the router to another, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from actors.http_server import HttpServer
from actors.neighbours import NATS, PINNED, HandedOn, Neighbours, checked, engine_name, others, proven
from actors.pinning import Pinned, Pins
from cluster.live_versions import HEADER, LiveVersions, with_candidate, with_version

KEY = b"k" * 32
LIVE = with_version(LiveVersions("old", {"old": {}}), "new", {}, {0: 4}, {"gate": "blob"})


async def nats(tokens: list[int], manifest: str) -> float:
    return len(tokens) + (manifest == "new") / 2


class Replica:
    """With an application that says which version it computed, in pieces."""

    def __init__(self) -> None:
        self.inner, self.outer = HttpServer("127.0.0.1", 0), HttpServer("127.0.0.1", 0)
        self.name = engine_name("r", "127.0.0.1", self.inner.port)
        self.pins, self.neighbours = Pins(self.name), Neighbours(lambda: KEY)
        self.left, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        app = Pinned(self._answer, self.pins, self.neighbours)
        self.inner.start(HandedOn(app, KEY, nats))
        self.outer.start(app)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        said = f"{self.pins.current()} {scope.get(PINNED, '-')} {scope['query_string'].decode()} ".encode()
        await send({"type": "http.response.body", "body": said, "more_body": True})
        waiting = [asyncio.create_task(self.go.wait()), asyncio.create_task(receive())]  # type: ignore[arg-type]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if waiting[1].done():
            self.left.set()
        for task in waiting:
            task.cancel()
        await send({"type": "http.response.body", "body": body})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.outer.port}/v1/completions?a=b"


async def listening(port: int) -> None:
    while True:
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.01)


@asynccontextmanager
async def two(share: float = 1.0) -> AsyncIterator[tuple[Replica, Replica, httpx.AsyncClient]]:
    """The first computes the version that serves, the second the candidate."""
    replicas = sorted((Replica(), Replica()), key=lambda replica: replica.name)
    versions = with_candidate(LIVE, "new", share, [replica.name for replica in replicas])
    assert versions.pinned == replicas[1].name
    for replica in replicas:
        replica.pins.use(versions)
        for server in (replica.inner, replica.outer):
            await listening(server.port)
    async with httpx.AsyncClient() as client:
        yield replicas[0], replicas[1], client
    for replica in replicas:
        await asyncio.gather(replica.inner.stop(0.1), replica.outer.stop(0.1))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(bounded())


@pytest.mark.parametrize("share", [1.0, 1e-9])
def test_a_request_is_answered_by_the_replica_that_computes_its_version(share: float) -> None:
    wanted = "new" if share == 1.0 else "old"

    async def test() -> None:
        async with two(share) as (first, second, client):
            for replica in (first, second):
                answer = await client.post(replica.url, content=b"body")
                own = (replica is second) == (wanted == "new")
                handed_on = "-" if own else wanted
                assert answer.status_code == 200 and answer.headers[HEADER] == wanted
                assert answer.text == f"{wanted} {handed_on} a=b body"
                assert len(answer.headers.get_list("date")) == len(answer.headers.get_list("server")) == 1
            assert first.pins.busy is second.pins.busy is False

    run(test)


def test_an_answer_streams_through() -> None:
    async def test() -> None:
        async with two() as (first, second, client):
            second.go.clear()
            async with client.stream("POST", first.url, content=b"rest") as answer:
                pieces = answer.aiter_text()
                assert await anext(pieces) == "new new a=b "
                second.go.set()
                assert await anext(pieces) == "rest"

    run(test)


def test_a_client_that_leaves_ends_the_work_there() -> None:
    async def test() -> None:
        async with two() as (first, second, client):
            second.go.clear()
            async with client.stream("POST", first.url, content=b"rest") as answer:
                await anext(answer.aiter_text())
            await second.left.wait()

    run(test)


def test_where_nobody_is_left_the_version_that_is_here_answers() -> None:
    async def test() -> None:
        async with two() as (first, second, client):
            await second.inner.stop(0.1)
            answer = await client.post(first.url, content=b"body")
            assert answer.text == "old - a=b body" and answer.headers[HEADER] == "old"

    run(test)


def test_one_that_is_behind_waits_for_the_table_and_one_that_changes_hands_on() -> None:
    async def test() -> None:
        async with two() as (first, second, client):
            trial = second.pins.versions
            second.pins.use(LIVE)
            asked = asyncio.create_task(client.post(first.url, content=b"body"))
            await asyncio.sleep(0)
            second.pins.hold(trial)
            # Users of the version that serves need not wait until the other one is ready.
            second.pins.versions = with_candidate(LIVE, "new", 1e-9, trial.engines)
            second.pins._coming = second.pins.versions
            answer = await client.post(second.url, content=b"body")
            assert answer.text == "old old a=b body" and not asked.done()
            second.pins.use(trial)
            assert (await asked).text == "new new a=b body"

    run(test)


def test_only_other_replicas_are_heard_on_the_inner_port() -> None:
    async def test() -> None:
        async with two() as (first, second, client):
            url = f"http://127.0.0.1:{second.inner.port}{NATS}"
            for headers in ({}, {"x-expertmesh-pinned": "new"}, {"x-expertmesh-pinned": "new:é"}):
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                refused = await client.post(url, json={"tokens": [1]}, headers=encoded)
                assert refused.status_code == 403
            found = await first.neighbours.post(second.name, NATS, "new", {"tokens": [1, 2]})
            assert found.json() == {"nats": 2.5}
            # And what clients send elsewhere names no version.
            shown = {"x-expertmesh-pinned": proven(KEY, "old")}
            assert (await client.post(second.url, content=b"", headers=shown)).text.startswith("new -")

    run(test)


def test_names() -> None:
    assert checked(KEY, proven(KEY, "m")) == "m" and checked(KEY, proven(b"other", "m")) is None
    assert others(["a:1", "b:2"], "b:2") == ["a:1"]
