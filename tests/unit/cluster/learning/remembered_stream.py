"""A stream whose shards are parsed once, for loops that begin anew again and again over one that nobody changes."""

from __future__ import annotations

from typing import Any

from cluster.learning.records import Record
from cluster.learning.stream import Stream


class RememberedStream(Stream):
    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._seen: dict[int, list[Record]] = {}

    def read(self, number: int) -> list[Record]:
        if number not in self._seen:
            self._seen[number] = super().read(number)
        return self._seen[number]
