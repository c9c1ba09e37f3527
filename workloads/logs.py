"""Logging of the command line's own process: structured lines on standard error."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str) -> None:
    """Send structlog to standard error from `level` up; standard output stays for results."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # Looked up at each line: it may be another one by then, where the command was called by a program.
        logger_factory=lambda *args: structlog.PrintLogger(sys.stderr),
    )
