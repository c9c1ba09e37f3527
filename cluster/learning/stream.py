"""The stream: shards of records in the order in which they came, on a disk or an object store.

Each shard is a file with the next number, and a file of one name can be created only once, so that any number of
routers write to one stream without knowing of each other. A number says how far a reader is: whoever has read up to
one reads on after it, and reads nothing twice. Shards are never changed but to forget somebody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from cluster.errors import LearningError
from cluster.learning.records import Record, from_parquet, to_parquet
from cluster.versions.files import Files

_FOLDER: Final = "shards"


class Stream:
    """The shards under a URL."""

    def __init__(self, url: str, **options: Any) -> None:
        """`options` are the file system's own. VersionError if it can't be opened."""
        self._files = Files(url, **options)

    @property
    def url(self) -> str:
        """Where it is."""
        return self._files.url

    def append(self, records: Sequence[Record]) -> int:
        """Keep some records as the next shard; its number. LearningError for none, VersionError if there is no room."""
        if not records:
            raise LearningError("a shard of no records is none", "give some")
        data = to_parquet(records)
        number = self.last() + 1
        while not self._files.create(_name(number), data):
            # Somebody else took it.
            number += 1
        return number

    def numbers(self) -> list[int]:
        """Of all shards, ascending."""
        return sorted(int(name.rpartition("/")[2]) for name in self._files.names(_FOLDER))

    def last(self) -> int:
        """The latest one's; 0 before the first."""
        return max(self.numbers(), default=0)

    def read(self, number: int) -> list[Record]:
        """A shard's records. VersionError if it is gone, LearningError if it is damaged."""
        return from_parquet(self._files.read(_name(number)), f"{self.url}/{_name(number)}")

    def after(self, offset: int) -> Iterator[tuple[int, list[Record]]]:
        """All shards behind a number, with theirs."""
        for number in self.numbers():
            if number > offset:
                yield number, self.read(number)

    def forget(self, key: str) -> int:
        """Take out all that is of one owner, with what was said of it; the number of records."""
        taken = 0
        answers: set[str] = set()
        for number, records in self.after(0):
            answers.update(record.id for record in records if record.key == key)
            left = [record for record in records if record.key != key and record.id not in answers]
            if len(left) < len(records):
                taken += len(records) - len(left)
                # An empty shard keeps its number taken.
                self._files.renew(_name(number), to_parquet(left))
        return taken

    def expire(self, before: float) -> int:
        """Take away shards from the first on, until one holds something younger than a time (seconds since 1970); how
        many.

        The latest stays, or its number would be given again.
        """
        count = 0
        for number in self.numbers()[:-1]:
            if any(record.at >= before for record in self.read(number)):
                break
            self._files.remove(_name(number))
            count += 1
        return count


def _name(number: int) -> str:
    return f"{_FOLDER}/{number:012}"
