"""Requests that go on while a mesh is changed, each checked token for token."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM

PROMPTS = [[7, 11, number] for number in range(3, 11)]
TOKENS = 16


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
    """`TOKENS` greedy tokens."""
    answer: Any = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].token_ids)


@torch.inference_mode()
def greedy(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The same of each prompt, in float32 by transformers alone."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], dim=1)
        found.append(ids[0, len(prompt) :].tolist())
    return found
