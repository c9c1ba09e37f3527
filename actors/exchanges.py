"""From a request and its answer, as they went over HTTP, to records of the stream: pure functions.

Kept is what is whole and text: an answer that broke off, failed or was asked for in token numbers teaches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.learning.records import Record

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
# Of answers that were not computed with all experts; see `actors.degraded`.
_MARKED: Final = "expertmesh"
# An answer that was broken off has another reason, or none.
_WHOLE: Final = frozenset({"stop", "length"})


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request that was answered with 200."""

    path: str
    at: float
    """Seconds since 1970."""
    key: str
    """Of whose it is, see `cluster.learning.records.owner`."""
    manifest: str
    request: bytes
    response: bytes
    streamed: bool
    context: str = ""
    propensity: float | None = None
    """See `cluster.learning.records.Record`."""


Render = Callable[[list[dict[str, Any]]], str]
"""A conversation as the text that the model sees before its answer."""


def records_of(exchange: Exchange, render: Render, domain: str, consent: str) -> list[Record]:
    """What is kept of it: one record per answer, the first under the id that feedback names."""
    try:
        asked = json.loads(exchange.request)
        body = exchange.response
        answers = list(_streamed(body) if exchange.streamed else _whole(json.loads(body)))
        prompts = [render(asked["messages"])] if exchange.path == CHAT else _prompts(asked["prompt"])
        per_prompt = max(1, int(asked.get("n") or 1))
        if not prompts or asked.get("echo"):
            return []
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return []
    found = []
    for number, (answer_id, index, text) in enumerate(answers):
        if index // per_prompt < len(prompts):
            found.append(
                Record(
                    "request",
                    answer_id if number == 0 else f"{answer_id}#{index}",
                    exchange.at,
                    exchange.key,
                    domain,
                    exchange.manifest,
                    consent,
                    prompts[index // per_prompt],
                    text,
                    context=exchange.context,
                    propensity=exchange.propensity,
                )
            )
    return found


def _prompts(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    return list(prompt) if all(isinstance(text, str) for text in prompt) else []


def _whole(answer: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(Id, index, text) of each answer that ended by itself."""
    if _MARKED in answer:
        return
    for choice in answer["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if choice.get("finish_reason") in _WHOLE and isinstance(text, str):
            yield str(answer["id"]), int(choice["index"]), text


def _streamed(body: bytes) -> Iterator[tuple[str, int, str]]:
    """The same of a stream's events. ValueError if it did not come to its end."""
    texts: dict[int, str] = {}
    ended: dict[int, str] = {}
    answer_id, done = "", False
    for line in body.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if _MARKED in event:
            raise ValueError("the answer was computed without some experts")
        answer_id = str(event.get("id", answer_id))
        for choice in event["choices"]:
            index = int(choice["index"])
            delta = choice.get("delta", {}).get("content") if "delta" in choice else choice.get("text")
            texts[index] = texts.get(index, "") + (delta or "")
            if choice.get("finish_reason"):
                ended[index] = choice["finish_reason"]
    if not done:
        raise ValueError("the stream was broken off")
    for index, text in sorted(texts.items()):
        if ended.get(index) in _WHOLE:
            yield answer_id, index, text
