"""What HTTP answers say of missing experts, over an application that plays vLLM's part."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from actors.degraded import Degraded, Unavailable
from actors.outages import Outages
from actors.rescue import Outage

ERROR = 'data: {"error": {"message": "no living host", "type": "ServiceUnavailableError", "code": 503}}\n\n'
TOKEN, DONE = 'data: {"id": "cmpl-7", "choices": [{"text": "a"}]}\n\n', "data: [DONE]\n\n"


def post(app: ASGIApp) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/")

    return asyncio.run(call())


def streaming(*events: str) -> Starlette:
    async def answer(request: Request) -> Response:
        async def generate():
            for event in events:
                yield event

        return StreamingResponse(generate(), media_type="text/event-stream")

    return Starlette(routes=[Route("/", answer, methods=["POST"])])


def plain(body: object, status: int = 200) -> Starlette:
    async def answer(request: Request) -> Response:
        return JSONResponse(body, status)

    return Starlette(routes=[Route("/", answer, methods=["POST"])])


def test_a_503_says_when_to_come_back() -> None:
    answer = post(Unavailable(plain({"error": {}}, 503)))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "retry-after" not in post(Unavailable(plain({}, 200))).headers
    assert "retry-after" not in post(Unavailable(plain({}, 500))).headers


def test_a_stream_that_begins_with_an_error_is_that_error() -> None:
    answer = post(Unavailable(streaming(ERROR, DONE)))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "no living host"


def test_a_stream_that_an_error_ends_is_never_done() -> None:
    answer = post(Unavailable(streaming(TOKEN, TOKEN, ERROR, DONE)))
    assert answer.status_code == 200
    assert answer.text == TOKEN + TOKEN + ERROR


def test_a_whole_stream_passes_as_it_is() -> None:
    assert post(Unavailable(streaming(TOKEN, TOKEN, DONE))).text == TOKEN + TOKEN + DONE


def test_a_degraded_answer_says_so_once() -> None:
    marks = {"cmpl-7-0": "no living host holds expert 3", "cmpl-8-0": "another"}
    answer = post(Degraded(plain({"id": "cmpl-7", "choices": []}), marks))
    assert answer.json() == {
        "id": "cmpl-7",
        "choices": [],
        "expertmesh": {"degraded": "no living host holds expert 3"},
    }
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert marks == {"cmpl-8-0": "another"}
    assert "expertmesh" not in post(Degraded(plain({"id": "cmpl-7"}), marks)).json()


def test_a_degraded_stream_says_so_before_its_end() -> None:
    marks = {"cmpl-7": "no living host"}
    events = post(Degraded(streaming(TOKEN, TOKEN, DONE), marks)).text.strip().split("\n\n")
    assert events[:2] == [TOKEN.strip()] * 2
    assert json.loads(events[2].removeprefix("data: "))["expertmesh"] == {"degraded": "no living host"}
    assert events[3:] == [DONE.strip()]
    assert marks == {}


@pytest.fixture
def outages() -> Outages:
    """Three requests in a step: rows 0 to 3, row 4, rows 5 and 6."""
    made = Outages()
    made.attach(
        SimpleNamespace(
            input_batch=SimpleNamespace(num_reqs=3, req_ids=["a", "b", "c"]),
            query_start_loc=SimpleNamespace(np=np.array([0, 4, 5, 7, 7, 7])),
        )
    )
    return made


@pytest.mark.parametrize(
    ("rows", "names"),
    [((0,), ["a"]), ((3, 4), ["a", "b"]), ((5, 6), ["c"]), ((0, 6), ["a", "c"]), ((7, 8), []), ((), [])],
)
def test_rows_belong_to_requests(outages: Outages, rows: tuple[int, ...], names: list[str]) -> None:
    assert outages.requests(rows) == names


def test_a_step_s_outages_are_taken_once(outages: Outages) -> None:
    outages.note(Outage(0, (4,), "first", degraded=False))
    outages.note(Outage(1, (4, 5), "second", degraded=False))
    outages.note(Outage(1, (0,), "third", degraded=True))
    hit = outages.take()
    assert hit.failed == {"b": "first", "c": "second"}
    assert hit.degraded == {"a": "third"}
    assert not outages.take().failed


def test_a_warm_up_s_rows_belong_to_nobody() -> None:
    made = Outages()
    assert made.requests((0, 1)) == []
    made.attach(SimpleNamespace(input_batch=SimpleNamespace(num_reqs=0)))
    assert made.requests((0, 1)) == []
