"""Placements as pictures: how even each method is, how a shift is caught up with, and the plan as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.planner import FleetPlan
from workloads.plots import pyplot_for_files


def plot(report: Mapping[str, Any], planned: FleetPlan, file: Path) -> None:
    """Write the picture: balancedness over redundancy per number of hosts, the shift if any, the first layer."""
    pyplot = pyplot_for_files()
    results, shift = report["results"], report.get("shift")
    hosts = sorted({row["hosts"] for row in results})
    width = len(hosts) + (shift is not None)
    figure, axes = pyplot.subplots(2, width, figsize=(4.5 * width, 8), squeeze=False)
    for axis, number in zip(axes[0], hosts, strict=False):
        for method in dict.fromkeys(row["method"] for row in results):
            mine = [row for row in results if row["hosts"] == number and row["method"] == method]
            axis.plot(
                [row["redundancy"] for row in mine],
                [row["balancedness"] for row in mine],
                "o-",
                ms=3,
                label=method,
            )
        axis.set(title=f"{number} hosts", xlabel="copies of a layer's experts", ylabel="balancedness")
        axis.set_ylim(0, 1.02)
        axis.legend(fontsize="small")
    if shift is not None:
        axis = axes[0][-1]
        tokens, values = zip(*shift["over_time"], strict=True)
        axis.step(tokens, values, where="post", label="rebalanced online")
        axis.axhline(shift["known"], linestyle="--", linewidth=0.8, label="had it been known")
        axis.axhline(shift["before"], linestyle=":", linewidth=0.8, label="never rebalanced")
        axis.set(title="traffic shifts to another task", xlabel="tokens since", ylabel="balancedness")
        axis.set_ylim(0, 1.02)
        axis.legend(fontsize="small")
    grid = axes[1][0].get_gridspec()
    for axis in axes[1]:
        axis.remove()
    map_axis = figure.add_subplot(grid[1, :])
    layer = planned.layers[0]
    copies = np.zeros((len(planned.hosts), len(layer.holders)))
    for expert, held in enumerate(layer.holders):
        copies[list(held), expert] = len(held)
    image = map_axis.imshow(copies, aspect="auto", cmap="viridis", interpolation="nearest")
    map_axis.set(title=f"layer {layer.layer}: who holds what", xlabel="expert", ylabel="host")
    figure.colorbar(image, ax=map_axis, label="copies of the expert")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
