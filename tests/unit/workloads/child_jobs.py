"""What spawned children run in tests: here, because a child imports the module that its function is in."""

from __future__ import annotations

import os
from collections.abc import Callable


def serve_nothing(ready: Callable[[], None]) -> None:
    ready()


def end_at_once(_ready: Callable[[], None]) -> None:
    os._exit(3)
