"""Options that several groups of commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file (default: ./expertmesh.yaml).")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder of the base checkpoint, or 'default'.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object.")]
