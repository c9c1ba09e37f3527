"""Why the engine process died: its last words, which vLLM's exception in the router does not carry."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TAIL_BYTES = 1 << 16
# `RuntimeError: text` at the end of a traceback, with or without vLLM's prefix.
_ERROR = re.compile(r"(?:^|\] )((?:[A-Za-z_][\w]*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)): (\S.*)$")
# What vLLM says in the processes that only notice.
_NOTICED = re.compile(r"EngineDeadError|Engine core initialization failed|EngineGenerateError")


def engine_words() -> str:
    """The last error that the engine process logged through this worker's output files; "" if there is none.

    The engine inherits the worker's standard output, where vLLM logs, and standard error.
    """
    for descriptor in (1, 2):
        try:
            with Path(f"/proc/self/fd/{descriptor}").readlink().open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = stream.read().decode(errors="replace")
        except OSError:
            continue
        if words := last_error(text):
            return words
    return ""


def last_error(text: str) -> str:
    """`Kind: message` of the last error in a log that is not merely another process's echo; "" if none."""
    for line in reversed(text.splitlines()):
        match = _ERROR.search(line)
        if match and not _NOTICED.search(line):
            return f"{match[1].rpartition('.')[2]}: {match[2]}"
    return ""
