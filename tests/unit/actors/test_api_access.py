"""Keys, offered routes and OpenAI's error shape, on a small application in vLLM's place."""

from __future__ import annotations

import asyncio
import hashlib

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from prometheus_client import make_asgi_app

from actors.api_access import ApiKeys, OpenAIErrors, keep_listed_routes, key_digest

KEYS = ("first-key", "second key")


def application(keys: tuple[str, ...] = ()) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, str]:
        raise HTTPException(404, f"the model {name} does not exist, nor did it ever")

    @app.get("/v1/completions/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(("data: 1\n\n", "data: [DONE]\n\n")), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/scale_elastic_ep")
    async def scale() -> dict[str, str]:
        return {"scaled": "yes"}

    @app.get("/v1/modelsecrets")
    async def similar() -> dict[str, str]:
        return {"similar": "yes"}

    app.mount("/metrics", make_asgi_app())
    keep_listed_routes(app)

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    app.add_middleware(OpenAIErrors)
    if keys:
        app.add_middleware(ApiKeys, digests=tuple(key_digest(key) for key in keys))
    return app


def ask(app: FastAPI, path: str, method: str = "GET", authorization: str | None = None) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        headers = {} if authorization is None else {"Authorization": authorization}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers, follow_redirects=True)

    return asyncio.run(call())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_known_key_comes_through(key: str, scheme: str) -> None:
    answer = ask(application(KEYS), "/v1/models", authorization=f"{scheme} {key}")
    assert answer.json() == {"object": "list"}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-key2",
        "Bearer FIRST-KEY",
        "Basic first-key",
        "first-key",
        f"Bearer {hashlib.sha256(b'first-key').hexdigest()}",
    ],
)
def test_without_a_known_key_the_answer_is_401_in_openai_s_shape(authorization: str | None) -> None:
    answer = ask(application(KEYS), "/v1/models", authorization=authorization)
    assert answer.status_code == 401
    assert answer.json() == {
        "error": {
            "message": "invalid API key",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/ready", 200)])
def test_probes_need_no_key(path: str, status: int) -> None:
    assert ask(application(KEYS), path).status_code == status


@pytest.mark.parametrize("path", ["/metrics", "/v1/models/x", "/health/", "/nowhere", "/readyz"])
def test_everything_else_needs_one_even_where_there_is_nothing(path: str) -> None:
    assert ask(application(KEYS), path).status_code == 401


def test_without_keys_nobody_is_asked_for_one() -> None:
    assert ask(application(), "/v1/models").status_code == 200


@pytest.mark.parametrize(("path", "method"), [("/scale_elastic_ep", "POST"), ("/v1/modelsecrets", "GET")])
def test_routes_that_are_not_offered_are_gone(path: str, method: str) -> None:
    assert ask(application(), path, method).status_code == 404


def test_offered_routes_stay_with_what_lies_below_them() -> None:
    app = application()
    assert ask(app, "/v1/models").status_code == 200
    assert "python_info" in ask(app, "/metrics").text


@pytest.mark.parametrize(
    ("path", "method", "status", "words"),
    [("/nowhere", "GET", 404, "unknown path /nowhere"), ("/v1/models", "DELETE", 405, "not allowed")],
)
def test_mistaken_requests_get_openai_s_error_shape(path: str, method: str, status: int, words: str) -> None:
    answer = ask(application(), path, method)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_application_s_own_404_is_left_alone() -> None:
    answer = ask(application(), "/v1/models/phantom")
    assert (answer.status_code, answer.json()) == (
        404,
        {"detail": "the model phantom does not exist, nor did it ever"},
    )


def test_streams_pass_whole() -> None:
    answer = ask(application(KEYS), "/v1/completions/stream", authorization="Bearer first-key")
    assert answer.text == "data: 1\n\ndata: [DONE]\n\n"


def test_digests_tell_keys_apart_and_are_sha256() -> None:
    assert key_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len({key_digest(key) for key in ("a", "b", "a ", "A")}) == 4
