"""The chaos report as a picture: throughput and the longest gaps over time, with the faults marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workloads.plots import pyplot_for_files


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Write the picture: per scenario one row, all its runs in it."""
    pyplot = pyplot_for_files()
    names = list(report["scenarios"])
    figure, axes = pyplot.subplots(len(names), 2, figsize=(13, 3 * len(names)), squeeze=False)
    for (left, right), name in zip(axes, names, strict=True):
        for run in (run for run in report["runs"] if run["scenario"] == name):
            label = f"seed {run['seed']}"
            (drawn,) = left.step(
                range(len(run["tokens_per_s"])), run["tokens_per_s"], where="post", label=label
            )
            right.plot(
                [at for at, _ in run["gaps"]],
                [ms for _, ms in run["gaps"]],
                ".",
                ms=3,
                color=drawn.get_color(),
            )
            for fault in run["faults"]:
                for axis in (left, right):
                    axis.axvline(fault["at_s"], color=drawn.get_color(), linestyle="--", linewidth=0.8)
        left.set(title=name, xlabel="seconds", ylabel="tokens/s")
        left.set_ylim(bottom=0)
        left.legend(fontsize="small")
        right.set(title=f"{name}: longest gaps", xlabel="seconds", ylabel="ms between tokens", yscale="log")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
