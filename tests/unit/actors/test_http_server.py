"""The router's HTTP server: its address is taken at once, shared only by its own kind, and given back."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from actors.http_server import HttpServer
from cluster.errors import ConfigError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def application(word: str) -> Starlette:
    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse(word)

    return Starlette(routes=[Route("/", answer)])


def test_it_answers_and_gives_the_port_back() -> None:
    port = free_port()

    async def run() -> str:
        server = HttpServer("127.0.0.1", port)
        server.start(application("hello"))
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=5)) as client:
            text = (await client.get(f"http://127.0.0.1:{port}/")).text
        assert server.running
        await server.stop(1.0)
        assert not server.running
        return text

    assert asyncio.run(run()) == "hello"
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


def test_two_replicas_share_a_port_and_one_of_them_may_end() -> None:
    port = free_port()

    async def run() -> str:
        first, second = HttpServer("127.0.0.1", port), HttpServer("127.0.0.1", port)
        first.start(application("first"))
        second.start(application("second"))
        while not (first.running and second.running):
            await asyncio.sleep(0)
        await first.stop(1.0)
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=5)) as client:
            text = (await client.get(f"http://127.0.0.1:{port}/")).text
        await second.stop(1.0)
        return text

    assert asyncio.run(run()) == "second"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            HttpServer("127.0.0.1", port)
