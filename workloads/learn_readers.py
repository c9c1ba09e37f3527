"""Who says how likely the version that serves finds a text: the server itself, or the version, opened here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import httpx

from cluster.errors import HostError
from cluster.live_versions import HEADER

if TYPE_CHECKING:
    from workloads.learn_workshop import Workshop

Encode = Callable[[str], list[int]]

# A text waits for what the server computes before it.
_READ_S: Final = 120.0
_FEWEST: Final = 2


class Reader(Protocol):
    """Of one version at a time."""

    def read(self, manifest: str, texts: Sequence[str]) -> Iterator[float | None]:
        """Bits per byte that a version takes for each; None for one that it can't say anything of.

        ExpertmeshError if it can't be asked.
        """


def shortened(text: str, encode: Encode, most: int) -> tuple[str, list[int]]:
    """The beginning of a text that is at most so many tokens, and these."""
    tokens = encode(text)
    while len(tokens) > most:
        text = text[: min(len(text) - 1, len(text) * most // len(tokens))]
        tokens = encode(text)
    return text, tokens


class ServerReader:
    """By its API, one text at a time. What is asked for in token numbers is kept in no stream."""

    def __init__(
        self, url: str, key: str, encode: Encode, most_tokens: int, wait: Callable[[], None] = lambda: None
    ) -> None:
        """`wait` returns when the server has little to do, and is called before each text."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=_READ_S)
        self._encode, self._most, self._wait = encode, most_tokens, wait
        self._model = ""

    def read(self, manifest: str, texts: Sequence[str]) -> Iterator[float | None]:
        for text in texts:
            self._wait()
            short, tokens = shortened(text, self._encode, self._most)
            yield self._bits(manifest, tokens, len(short.encode())) if len(tokens) >= _FEWEST else None

    def _bits(self, manifest: str, tokens: list[int], size: int) -> float | None:
        if not self._model:
            self._model = str(self._asked("GET", "/v1/models").json()["data"][0]["id"])
        body = {
            "model": self._model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        answer = self._asked("POST", "/v1/completions", body)
        found: dict[str, Any] = answer.json()
        # One on trial may have been asked, and what was computed without some experts is nobody's.
        if answer.headers.get(HEADER, manifest) != manifest or "expertmesh" in found:
            return None
        told = found["choices"][0]["prompt_logprobs"]
        return bits_told(told, tokens) / size

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise HostError(
                f"{self._client.base_url} does not answer: {error or type(error).__name__}",
                "see whether it runs",
            ) from error
        if answer.status_code in (401, 403):
            raise HostError(
                f"{self._client.base_url} wants an API key",
                "have server.api_keys in this configuration as the server has it",
            )
        if answer.is_error:
            raise HostError(
                f"{self._client.base_url}{path.lstrip('/')} answers {answer.status_code}: {answer.text[:200]}",
                "learning.gate.tokens must be fewer than the server's longest text",
            )
        return answer


def bits_told(told: Sequence[dict[str, Any] | None], tokens: Sequence[int]) -> float:
    """Bits of a text after its first token, as the API tells probabilities of prompts."""
    nats = 0.0
    for token, of_token in zip(tokens, told, strict=True):
        if of_token is not None:
            nats -= float(of_token[str(token)]["logprob"])
    return nats / math.log(2)


class VersionReader:
    """By the version itself, which is opened for as long as there are texts to be read."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def read(self, manifest: str, texts: Sequence[str]) -> Iterator[float | None]:
        if not texts:
            return
        from actors.trainable_version import open_encoder, open_version
        from actors.version_comparison import bits_of

        workshop = self._workshop
        encode = open_encoder(workshop.checkpoint)
        model = open_version(workshop.checkpoint, workshop.store, workshop.own(manifest))
        for text in texts:
            short, tokens = shortened(text, encode, workshop.settings.gate.tokens)
            yield bits_of(model, tokens) / len(short.encode()) if len(tokens) >= _FEWEST else None
