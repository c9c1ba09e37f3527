"""Small domains of what every Python has, for where packages can't be had, and for tests."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from hashlib import sha256
from importlib.abc import InspectLoader
from importlib.util import find_spec
from typing import Final

from cluster.errors import LearningError
from workloads.bench.learn_documents import documents_of

_MODULES: Final = (
    "argparse", "ast", "calendar", "configparser", "csv", "datetime", "doctest", "enum", "fractions", "heapq",
    "inspect", "ipaddress", "mailbox", "pathlib", "shutil", "statistics", "subprocess", "tarfile", "threading",
    "turtle", "typing", "uuid", "zipfile",
)  # fmt: skip
_SCRIPTS: Final = (
    range(0x20, 0x3000),  # alphabets, signs
    range(0xA000, 0xAC00),
    range(0x10000, 0x12600),
    range(0x1D000, 0x1FB00),
)
_SUMS: Final = 5400
_SMALL: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS: Final = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def builtin_domains() -> dict[str, list[str]]:
    """Domain → documents, at least 200 KB each, the same for a version of Python.

    `python` is program text, `unicode` a table of names, `sums` arithmetic in words, and `general`, which is not to be
    learnt, the prose of Python's reference. LearningError for a Python without its sources.
    """
    return {
        "python": documents_of(_sources()),
        "unicode": documents_of(_names()),
        "sums": documents_of(_sums()),
        "general": documents_of(_reference()),
    }


def _sources() -> Iterator[str]:
    for name in _MODULES:
        spec = find_spec(name)
        source = spec.loader.get_source(name) if spec and isinstance(spec.loader, InspectLoader) else None
        if source is None:
            raise LearningError(
                f"this Python has no source of its module {name}",
                "domains of packages need none: leave out --builtin",
            )
        yield source


def _names() -> Iterator[str]:
    """A text for every 64 characters."""
    for script in _SCRIPTS:
        for start in range(script.start, script.stop, 64):
            lines = [
                f"U+{code:04X} {unicodedata.category(chr(code))} {unicodedata.name(chr(code)).lower()}"
                for code in range(start, start + 64)
                if unicodedata.name(chr(code), "")
            ]
            if lines:
                yield "\n".join(lines)


def _sums() -> Iterator[str]:
    """Texts of twelve sums and differences."""
    lines = []
    for number in range(_SUMS):
        lot = int.from_bytes(sha256(f"sum {number}".encode()).digest()[:8], "big")
        a, b = lot % 500, lot // 500 % 500
        if lot >> 63:
            lines.append(f"{_words(a)} and {_words(b)} make {_words(a + b)}.")
        else:
            a, b = max(a, b), min(a, b)
            lines.append(f"{_words(b)} from {_words(a)} leaves {_words(a - b)}.")
        if len(lines) == 12:
            yield "\n".join(lines)
            lines = []


def _words(number: int) -> str:
    """A number below 1000 in words."""
    if number >= 100:
        rest = f" {_words(number % 100)}" if number % 100 else ""
        return f"{_words(number // 100)} hundred{rest}"
    if number < 20:
        return _SMALL[number]
    return _TENS[number // 10 - 2] + (f"-{_SMALL[number % 10]}" if number % 10 else "")


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
