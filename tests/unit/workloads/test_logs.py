"""Where the command line's own lines go."""

from __future__ import annotations

import io
import sys

import pytest
import structlog

from workloads.logs import configure


def test_lines_go_to_what_is_standard_error_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structlog.get_config()
    first, second = io.StringIO(), io.StringIO()
    log = structlog.get_logger()
    try:
        monkeypatch.setattr(sys, "stderr", first)
        configure("warning")
        log.warning("one")
        log.info("nothing of this")
        first.close()
        monkeypatch.setattr(sys, "stderr", second)
        log.warning("two")
    finally:
        structlog.configure(**before)
    assert "two" in second.getvalue() and "nothing" not in second.getvalue()
