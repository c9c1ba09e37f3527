"""How long-running model work tells its caller where it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, float], None]
"""Called with a stage ("weights", "digests", ...) and the fraction of that stage that is done, 0 to 1."""


def silent(stage: str, fraction: float) -> None:
    """The progress callback of callers that show nothing."""
