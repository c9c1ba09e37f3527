"""`expertmesh bench dispatch | serve`."""

from __future__ import annotations

import typer

bench_app = typer.Typer(help="Measurements; each can write one JSON object.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    """Measurements."""
