"""Plots as files, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.errors import ConfigError


def check_plot(file: Path) -> None:
    """ConfigError if no picture could be written there: asked before hours of measuring, not after."""
    pyplot_for_files()
    if file.suffix.lower() != ".png":
        raise ConfigError(f"the plot {file} is not a PNG file's name", "end it in .png")
    if not file.parent.is_dir():
        raise ConfigError(f"the plot {file} can't be written: no such folder", "name a folder that exists")


def pyplot_for_files() -> Any:
    """matplotlib's pyplot, without any window. ConfigError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed",
            "pip install expertmesh[bench], or leave the plot out",
        ) from error
    # No window, wherever this runs.
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
