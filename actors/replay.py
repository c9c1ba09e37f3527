"""Held-out text, predicted by the version on trial and by the one that serves: which of them expects it less?

Beside the requests, one text at a time, and each text once a trial. Both versions see the same tokens, so that the
difference says more than two averages would.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import structlog

from actors.pinning import Pins
from cluster.errors import VersionError

log = structlog.get_logger()

_MOST_TOKENS: Final = 256
_LEAST_TOKENS: Final = 8
_POLL_S: Final = 1.0


def texts(path: Path) -> list[str]:
    """The texts of a file: the `text` of each line of JSON, else its paragraphs. VersionError if there is none."""
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VersionError(f"{path} can't be read: {error}", "see versions.holdout") from error
    found = list(_of_json(content)) if path.suffix == ".jsonl" else content.split("\n\n")
    found = [text.strip() for text in found if text.strip()]
    if not found:
        raise VersionError(
            f"{path} has no text in it", "paragraphs, or lines of JSON with a `text`, are expected"
        )
    return found


class Replay:
    """Of one replica of the router."""

    def __init__(
        self,
        pins: Pins,
        path: Path,
        encode: Callable[[str], list[int]],
        nats: Callable[[list[int], str], Awaitable[float]],
        predicted: Callable[[float], None],
        *,
        pause_s: float = 0.5,
    ) -> None:
        """`nats` says how little a version expects a text, per token, and `predicted` is told by how much less the
        candidate does.
        """
        self._pins, self._path, self._encode = pins, path, encode
        self._nats, self._predicted, self._pause_s = nats, predicted, pause_s

    async def run(self) -> None:
        """Watch for trials, and replay in each."""
        done = ""
        while True:
            versions = self._pins.versions
            candidate = versions.candidate
            # By one replica alone where one alone computes it.
            if candidate and candidate != done and versions.pinned in ("", self._pins.engine):
                done = candidate
                try:
                    await self._trial(candidate)
                except Exception as error:
                    log.warning("held-out text not replayed", reason=str(error).strip().splitlines()[-1:])
            elif not candidate:
                done = ""
            await asyncio.sleep(_POLL_S)

    async def _trial(self, candidate: str) -> None:
        loop = asyncio.get_running_loop()
        documents = await loop.run_in_executor(None, texts, self._path)
        for text in documents:
            versions = self._pins.versions
            if versions.candidate != candidate:
                return
            tokens = self._encode(text)[:_MOST_TOKENS]
            if len(tokens) >= _LEAST_TOKENS:
                serving = await self._nats(tokens, versions.serving)
                self._predicted(await self._nats(tokens, candidate) - serving)
                await asyncio.sleep(self._pause_s)


def _of_json(content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise VersionError(f"line {number} of the held-out text has no `text`: {error}") from error
