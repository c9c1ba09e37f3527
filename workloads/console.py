"""Where commands print: a terminal as wide as it is, anything else as wide as the text."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

from cluster.errors import ExpertmeshError

# Rich takes what is no terminal for one of 80 columns, and cuts tables to fit: `expertmesh status | grep`
# would not find a host by its name.
_UNCUT = 10_000


def console() -> Console:
    """Standard output."""
    return Console(width=None if sys.stdout.isatty() else _UNCUT)


err = Console(stderr=True)


def show_mistake(error: ExpertmeshError) -> None:
    """The message, and below it the way out, on standard error."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(f"  {escape(error.hint)}", highlight=False, soft_wrap=True)
