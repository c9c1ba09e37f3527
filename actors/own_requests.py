"""Requests to the engine that are nobody's: how their ids begin."""

from typing import Final

PROBE: Final = "ready-"
"""Those that only ask whether a token flows."""
REPLAY: Final = "replay-"
"""Those that only ask how well a text is predicted."""
