"""The official client against a real server: a real tokenizer and chat template, tiny random weights."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import httpx
import openai
import pytest

from cluster.learning.records import Record, with_feedback
from cluster.learning.stream import Stream
from tests.e2e.programs import ServerProgram, wait_for

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "extra_body": {"ignore_eos": True}}
PROMPT = "The river froze early"
QUESTION: list[Any] = [{"role": "user", "content": "The river froze early that winter"}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other")
    assert "other" in refused.value.message


def test_completion_counts_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, max_tokens=7, **GREEDY)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_text_and_token_ids_are_the_same_prompt(client: openai.OpenAI, server: ServerProgram) -> None:
    tokens = _tokenize(server, PROMPT)
    text, ids = (client.completions.create(prompt=p, max_tokens=8, **GREEDY) for p in (PROMPT, tokens))
    assert text.choices[0].text == ids.choices[0].text
    assert ids.usage is not None and ids.usage.prompt_tokens == len(tokens)


def test_several_prompts_at_once(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "In 1969 two people", "a"]
    alone = [client.completions.create(prompt=p, max_tokens=8, **GREEDY).choices[0].text for p in prompts]
    together = client.completions.create(prompt=prompts, max_tokens=8, **GREEDY)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]


def test_several_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, n=3, temperature=1.0, seed=1, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3


def test_a_seed_repeats(client: openai.OpenAI) -> None:
    first, again, other = (
        client.completions.create(model="tiny", prompt=PROMPT, temperature=1.0, seed=seed, max_tokens=16)
        for seed in (5, 5, 6)
    )
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text


def test_stop_ends_before_the_text(client: openai.OpenAI) -> None:
    ids = {"return_token_ids": True, "ignore_eos": True}
    options: dict[str, Any] = {**GREEDY, "prompt": PROMPT, "max_tokens": 24}
    whole = client.completions.create(**{**options, "extra_body": ids}).choices[0]
    stop_id = whole.token_ids[5]  # type: ignore[attr-defined]
    first = whole.token_ids.index(stop_id)  # type: ignore[attr-defined]
    ended = client.completions.create(**{**options, "extra_body": {**ids, "stop_token_ids": [stop_id]}})
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage is not None and ended.usage.completion_tokens == first + 1
    printable = next(c for c in whole.text if c.isascii() and c.isalnum())
    cut = client.completions.create(stop=[printable], **options).choices[0]
    assert (cut.finish_reason, cut.text) == ("stop", whole.text.split(printable)[0])


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    plain = client.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY).choices[0].text
    assert (
        client.completions.create(prompt=PROMPT, max_tokens=4, echo=True, **GREEDY).choices[0].text
        == PROMPT + plain
    )


def test_completion_logprobs(client: openai.OpenAI) -> None:
    # As ids, since several tokens of single bytes have the same text.
    options = {**GREEDY, "extra_body": {"ignore_eos": True, "return_tokens_as_token_ids": True}}
    found = client.completions.create(prompt=PROMPT, max_tokens=5, logprobs=3, **options).choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.token_logprobs) == 5
    for chosen, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert chosen is not None and top is not None
        # Greedy: the chosen token is the best one.
        assert chosen <= 0 and chosen == pytest.approx(max(top.values()))


def test_streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY).choices[0].text
    parts = [
        chunk.choices[0].text
        for chunk in client.completions.create(prompt=PROMPT, max_tokens=20, stream=True, **GREEDY)
    ]
    assert "".join(parts) == whole
    assert len(parts) > 5


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=QUESTION, max_tokens=12, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=2, **GREEDY
    )
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert all(
        len(token.top_logprobs) == 2 and token.token == token.top_logprobs[0].token for token in content
    )


def test_earlier_turns_are_read(client: openai.OpenAI) -> None:
    def ask(messages: list[Any]) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(messages=messages, max_tokens=12, **GREEDY)

    follow_up = [
        *QUESTION,
        {"role": "assistant", "content": "a  2  3"},
        {"role": "user", "content": "children"},
    ]
    long, short = ask(follow_up), ask(follow_up[-1:])
    assert long.usage is not None and short.usage is not None
    assert long.usage.prompt_tokens > short.usage.prompt_tokens
    assert long.choices[0].message.content != short.choices[0].message.content


def test_tokens_there_and_back(server: ServerProgram) -> None:
    text = "In 1969 two people walked on the Moon; ünïcode ☾"
    tokens = _tokenize(server, text)
    back = httpx.post(f"{server.url}/detokenize", json={"model": "tiny", "tokens": tokens}, timeout=60)
    assert back.json()["prompt"] == text


def test_probes_and_description(server: ServerProgram) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(f"{server.url}{path}", timeout=60)

    assert get("/health").status_code == 200
    ready = get("/ready")
    assert ready.status_code == 200
    assert set(ready.json()["host_round_trip_us"]) == {"local-0", "local-1"}
    assert get("/version").json()["version"]
    paths = get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/ready"} <= set(paths)


def test_metrics_of_engine_and_mesh(client: openai.OpenAI, server: ServerProgram) -> None:
    def dispatches() -> float:
        stats = httpx.get(f"{server.url}/expertmesh/stats", timeout=60).json()
        return stats["dispatches"]

    before = dispatches()
    client.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY)
    # Two MoE layers; one step for the prompt and three for the tokens after the first.
    assert dispatches() - before >= 8
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert "vllm:request_success_total" in text
    assert "expertmesh_engine_dispatches" in text
    experts = httpx.get(f"{server.url}/expertmesh/experts", timeout=60).json()
    assert set(experts["holders"]) == set(experts["layers"]) == {"0", "1"}
    # The controller is told every few seconds.
    wait_for(
        lambda: (
            'expertmesh_routing_effective_experts{layer="1"}'
            in httpx.get(f"{server.url}/metrics", timeout=60).text
        ),
        30,
        "the routing's series",
    )


def _tokenize(server: ServerProgram, text: str) -> list[int]:
    answer = httpx.post(f"{server.url}/tokenize", json={"model": "tiny", "prompt": text}, timeout=60)
    return answer.json()["tokens"]


def test_a_client_that_leaves_ends_its_work(server: ServerProgram) -> None:
    """Its requests leave the engine, and their key-value blocks are free, within a second."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "temperature": 0, "stream": True}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        with contextlib.ExitStack() as stack:
            # On busy cores the engine may be done before its first words are here.
            for _ in range(20):
                answer = stack.enter_context(
                    http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True})
                )
                assert answer.status_code == 200
                assert "error" not in next(answer.iter_lines())
                if _engine_load(http) != (0.0, 0.0):
                    break
            else:
                pytest.fail("no request was seen to run")
        left = time.monotonic()
        while _engine_load(http) != (0.0, 0.0):
            assert time.monotonic() - left < 1.0
            # The engine tells its load when it has computed something.
            http.post("/v1/completions", json={**body, "max_tokens": 1, "stream": False})


def _engine_load(http: httpx.Client) -> tuple[float, ...]:
    """Requests that run, and the share of key-value blocks in use."""
    lines = http.get("/metrics").text.splitlines()
    return tuple(
        float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).split()[-1])
        for name in ("num_requests_running", "kv_cache_usage_perc")
    )


def test_requests_are_kept_for_learning_where_that_was_agreed_to(
    client: openai.OpenAI, server: ServerProgram
) -> None:
    messages: Any = [{"role": "user", "content": "keep this"}]
    events = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True
        )
    )
    said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    feedback = {"id": events[0].id, "score": 1}
    stream = Stream(str(server.config.parent / "stream"))

    def kept() -> list[Record]:
        found = [record for _, shard in stream.after(0) for record in shard]
        return [record for record in with_feedback(found) if record.id == events[0].id]

    wait_for(kept, 30, "the answer to be kept")
    assert httpx.post(f"{server.url}/expertmesh/feedback", json=feedback).status_code == 204
    wait_for(lambda: kept()[0].score == 1.0, 30, "what was said of it")
    (record,) = kept()
    assert record.answer == said and "keep this" in record.prompt and record.consent == "a test"
    assert len(record.manifest) == 64
