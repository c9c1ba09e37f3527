"""What a request is like, as far as it is known when it is admitted: a few kinds, each of which many requests are of.

Nothing is looked into for it: a path, and how long the body is.
"""

from __future__ import annotations

from typing import Final

_CHAT: Final = "/v1/chat/completions"
_LENGTHS: Final = (("short", 400), ("middle", 3000))
"""Bytes of a request's body, below which it is so long."""

CONTEXTS: Final = tuple(
    f"{kind}/{length}" for kind in ("chat", "text") for length in ("short", "middle", "long")
)


def context_of(path: str, size: int) -> str:
    """One of `CONTEXTS`, by a request's path and the bytes of its body."""
    length = next((name for name, below in _LENGTHS if size < below), "long")
    return f"{'chat' if path == _CHAT else 'text'}/{length}"
