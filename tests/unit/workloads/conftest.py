"""The command line's tree of commands is made once for all tests: typer makes another for every call, in 0.1 s."""

from __future__ import annotations

from functools import cache

import pytest
import typer.main
import typer.testing


@pytest.fixture(autouse=True, scope="session")
def one_tree_of_commands() -> None:
    """Have what is made of an app kept; it knows nothing of the calls that it has seen."""
    typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)
