"""Where expertmesh keeps what can be made again: models, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/expertmesh``, else ``~/.cache/expertmesh``; it may not exist yet."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "expertmesh"
