"""Processes of a measurement: spawned, waited for, and gone when the parent is, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from cluster.errors import HostError

# Importing torch on busy cores; a child that needs longer is stuck.
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0


@contextlib.contextmanager
def child(serve: Callable[..., None], *args: Any) -> Iterator[int]:
    """Run ``serve(ready, *args)`` in a spawned process; the block begins once it has called ``ready()``.

    The value is its pid. HostError if the process ends or is silent before it is ready.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, serve, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            if not ours.poll(_START_TIMEOUT_S):
                raise HostError(f"bench process {serve.__name__} was not ready in {_START_TIMEOUT_S:.0f} s")
            ours.recv()
        except EOFError:
            raise HostError(
                f"bench process {serve.__name__} ended before it was ready", "its error is above"
            ) from None
        assert process.pid is not None
        yield process.pid
    finally:
        ours.close()
        process.join(_END_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


def _main(pipe: Connection, serve: Callable[..., None], *args: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent's end of the pipe is what ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        os._exit(0)

    def ready() -> None:
        pipe.send(None)
        threading.Thread(target=watch, name="watch-parent", daemon=True).start()

    serve(ready, *args)
    threading.Event().wait()
