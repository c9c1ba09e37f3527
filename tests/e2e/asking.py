"""Requests that go on while a mesh is changed, each checked token for token."""

from __future__ import annotations

import threading
from typing import Any

import openai

PROMPTS = [[7, 11, number] for number in range(3, 11)]


class Asking:
    """Requests that go on and on, and what came of them."""

    def __init__(self, client: openai.OpenAI, expected: list[list[int]]) -> None:
        self._client, self._expected = client, expected
        self.answers = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(4)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            number = (number + 1) % len(PROMPTS)
            try:
                tokens = ask(self._client, PROMPTS[number])
            except openai.OpenAIError as error:
                self.wrong.append(str(error))
                continue
            self.answers += 1
            if tokens != self._expected[number]:
                self.wrong.append(f"{PROMPTS[number]}: {tokens}")


def ask(client: openai.OpenAI, prompt: list[int]) -> list[int]:
    """16 greedy tokens."""
    answer: Any = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=16,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].token_ids)
