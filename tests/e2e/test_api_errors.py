"""What the API refuses: OpenAI's error shape, a 4xx status, and a server that goes on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.programs import ServerProgram

COMPLETION = {"model": "tiny", "prompt": "The river", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "prompt of a wrong type": {"prompt": 5},
    "no prompt": {"prompt": None},
    "empty prompt": {"prompt": ""},
    "empty list": {"prompt": []},
    "empty token list": {"prompt": [[]]},
    "token id beyond the vocabulary": {"prompt": [5, 100_000]},
    "token id beyond 32 bits": {"prompt": [2**40]},
    "negative token id": {"prompt": [-5, 3]},
    "fractional token id": {"prompt": [1.5]},
    "text too long": {"prompt": "river " * 5000},
    "too many token ids": {"prompt": [5] * 600},
    "max_tokens of a wrong type": {"max_tokens": "many"},
    "max_tokens zero": {"max_tokens": 0},
    "max_tokens negative": {"max_tokens": -1},
    "max_tokens beyond the context": {"max_tokens": 100_000},
    "temperature negative": {"temperature": -1},
    "temperature too high": {"temperature": 3},
    "temperature not a number": {"temperature": "nan"},
    "top_p zero": {"top_p": 0},
    "top_p above one": {"top_p": 1.5},
    "n zero": {"n": 0},
    "n negative": {"n": -1},
    "n beyond OpenAI's limit": {"n": 129},
    "logprobs negative": {"logprobs": -5},
    "logprobs too many": {"logprobs": 1000},
    "stop empty": {"stop": ""},
    "stop of a wrong type": {"stop": 5},
    "seed of a wrong type": {"seed": "a"},
    "seed beyond 64 bits": {"seed": 2**70},
    "logit_bias beyond the vocabulary": {"logit_bias": {"100000": 1}},
    "broken grammar": {"structured_outputs": {"regex": "("}},
    "unknown model": {"model": "other"},
}
CHATS: dict[str, dict[str, Any]] = {
    "unknown role": {"messages": [{"role": "wizard", "content": "a"}]},
    "role of a wrong type": {"messages": [{"role": 5, "content": "a"}]},
    "no messages": {"messages": []},
    "messages of a wrong type": {"messages": "a"},
    "content of a wrong type": {"messages": [{"role": "user", "content": 5}]},
    "an image": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
            }
        ]
    },
    "too long": {"messages": [{"role": "user", "content": "river " * 5000}]},
    "top_logprobs without logprobs": {"top_logprobs": 3},
    "too many top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "temperature negative": {"temperature": -1},
    "a template of the caller's": {"chat_template": "{{ 1 / 0 }}"},
    "unknown response format": {"response_format": {"type": "rhyme"}},
    "unknown model": {"model": "other"},
}


@pytest.fixture
def http(server: ServerProgram) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=120)


@pytest.mark.parametrize("change", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_completion(http: httpx.Client, change: dict[str, Any]) -> None:
    _refused(http.post("/v1/completions", json={**COMPLETION, **change}))
    _still_answers(http)


@pytest.mark.parametrize("change", CHATS.values(), ids=CHATS.keys())
def test_chat(http: httpx.Client, change: dict[str, Any]) -> None:
    _refused(http.post("/v1/chat/completions", json={**CHAT, **change}))
    _still_answers(http)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", ["{not json", "", "[1]", "null", '"text"', '{"model": "tiny"}', "\x00\xff"])
def test_malformed_body(http: httpx.Client, path: str, body: str) -> None:
    _refused(http.post(path, content=body.encode("latin-1"), headers={"content-type": "application/json"}))
    _still_answers(http)


def test_another_content_type(http: httpx.Client) -> None:
    _refused(http.post("/v1/completions", content="prompt=a", headers={"content-type": "text/plain"}))


@pytest.mark.parametrize("method, path", [("GET", "/nothing"), ("POST", "/v1/nothing"), ("GET", "/")])
def test_unknown_path(http: httpx.Client, method: str, path: str) -> None:
    assert _refused(http.request(method, path)) == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/sleep",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/pause",
        "/scale_elastic_ep",
    ],
)
def test_what_changes_the_engine_is_out_of_reach(http: httpx.Client, path: str) -> None:
    assert _refused(http.post(path, json={})) == 404


@pytest.mark.parametrize("method, path", [("GET", "/v1/completions"), ("DELETE", "/v1/models")])
def test_wrong_method(http: httpx.Client, method: str, path: str) -> None:
    assert _refused(http.request(method, path)) == 405


def test_a_reader_that_leaves_is_forgotten(http: httpx.Client) -> None:
    request = {**COMPLETION, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=request) as stream:
        next(stream.iter_lines())
    _still_answers(http)


def _refused(answer: httpx.Response) -> int:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"] and isinstance(error["message"], str)
    assert error["type"] and isinstance(error["type"], str)
    assert {"param", "code"} <= set(error)
    return answer.status_code


def _still_answers(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
