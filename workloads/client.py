"""`chat` and `complete`: the official OpenAI client against a running server."""

from __future__ import annotations

from typing import Any

import openai
from rich.console import Console

from cluster.errors import ExpertmeshError
from workloads import run_file


class Client:
    """Streams answers of one server to a console."""

    def __init__(self, url: str | None, api_key: str | None, max_tokens: int, temperature: float) -> None:
        self._url = url or run_file.the_one().url
        self._api = openai.OpenAI(base_url=f"{self._url}/v1", api_key=api_key or "none", max_retries=0)
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "stream": True}
        self._model = self._guard(lambda: self._api.models.list().data[0].id)

    def ask(self, messages: list[Any], console: Console) -> str:
        """Stream one answer; returns its text."""

        def stream() -> str:
            parts = []
            for chunk in self._api.chat.completions.create(
                model=self._model, messages=messages, **self._options
            ):
                text = chunk.choices[0].delta.content if chunk.choices else None
                if text:
                    parts.append(text)
                    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
            return "".join(parts)

        return self._guard(stream)

    def converse(self, console: Console) -> None:
        """Questions and answers until an empty line or end of input."""
        console.print(f"{self._model} at {self._url}; an empty line ends it", highlight=False)
        messages: list[Any] = []
        while True:
            try:
                question = console.input("[bold]> [/]")
            except EOFError:
                return
            if not question.strip():
                return
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": self.ask(messages, console)})

    def complete(self, prompt: str, console: Console) -> None:
        """Stream a continuation of `prompt`."""

        def stream() -> None:
            for chunk in self._api.completions.create(model=self._model, prompt=prompt, **self._options):
                if chunk.choices:
                    console.print(
                        chunk.choices[0].text, end="", markup=False, highlight=False, soft_wrap=True
                    )
            console.print()

        self._guard(stream)

    def _guard(self, call: Any) -> Any:
        try:
            return call()
        except openai.AuthenticationError as error:
            raise ExpertmeshError(
                f"{self._url} wants an API key", "give one with --api-key or EXPERTMESH_API_KEY"
            ) from error
        except openai.APIConnectionError as error:
            raise ExpertmeshError(
                f"no server answers at {self._url}", "start one with `expertmesh serve`"
            ) from error
        except openai.APIStatusError as error:
            raise ExpertmeshError(f"{self._url} answered {error.status_code}: {error.message}") from error
        except openai.APIError as error:
            raise ExpertmeshError(
                f"{self._url} broke the answer off: {error}", "ask again; see `expertmesh status`"
            ) from error
