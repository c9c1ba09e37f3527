"""Progress of long steps: one bar per stage on standard error, plain lines where that is no terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """Called with a stage's name and the fraction done, from 0 to 1."""

    def __init__(self, console: Console, stop: threading.Event | None) -> None:
        self._console = console
        self._stop = stop
        self._tasks: dict[str, TaskID] = {}
        self._seen: set[str] = set()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:24}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._bar.start()

    def __call__(self, stage: str, fraction: float) -> None:
        """Show how far `stage` is; KeyboardInterrupt once Ctrl-C was pressed, so that waiting ends."""
        if self._stop is not None and self._stop.is_set():
            raise KeyboardInterrupt
        if self._bar is None:
            if stage not in self._seen:
                self._seen.add(stage)
                self._console.print(f"{stage} ...", highlight=False)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=1.0)
        self._bar.update(self._tasks[stage], completed=fraction)

    def close(self) -> None:
        """Take the bars off the screen."""
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def stages(console: Console, stop: threading.Event | None = None) -> Iterator[Stages]:
    """Progress bars for the length of the block."""
    progress = Stages(console, stop)
    try:
        yield progress
    finally:
        progress.close()
