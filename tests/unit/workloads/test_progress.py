"""Progress of long steps, on a terminal and in a log file."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from workloads.progress import stages


def test_where_there_is_no_terminal_each_stage_is_one_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with stages(console) as progress:
        for fraction in (0.0, 0.5, 1.0):
            progress("loading experts", fraction)
        progress("first token", 0.5)
        progress("loading experts", 1.0)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "loading experts ...\nfirst token ...\n"


def test_on_a_terminal_the_bars_are_gone_at_the_end() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with stages(console) as progress:
        progress("loading experts", 0.5)
        progress.close()
        progress.close()
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "loading experts" in written
    # The cursor comes back, and the bar's line is erased.
    assert (
        written.rstrip().endswith("\x1b[?25h\r\x1b[1A\x1b[2K") or "\x1b[2K" in written.split("\x1b[?25h")[-1]
    )


def test_after_ctrl_c_the_next_report_interrupts() -> None:
    stop = threading.Event()
    with stages(Console(file=io.StringIO()), stop) as progress:
        progress("loading experts", 0.1)
        stop.set()
        with pytest.raises(KeyboardInterrupt):
            progress("loading experts", 0.2)
