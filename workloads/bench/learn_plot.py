"""A picture of what a stream of domains did: a matrix for some methods, and how all of them fare on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from workloads.plots import pyplot_for_files

_MATRICES: Final = ("naive", "replay", "ours")


def plot(report: Mapping[str, Any], file: Path) -> None:
    """ConfigError if matplotlib is not installed."""
    plt = pyplot_for_files()
    methods, domains = report["methods"], list(report["domains"])
    shown = [name for name in _MATRICES if name in methods] or list(methods)[:1]
    figure, axes = plt.subplots(
        1, len(shown) + 1, figsize=(4.5 * (len(shown) + 1) + 2, 4.5), layout="constrained"
    )
    change = {name: _change(methods[name]) for name in shown}
    bound = max(float(np.abs(values).max()) for values in change.values()) or 1.0
    for axis, name in zip(axes, shown, strict=False):
        image = axis.imshow(change[name], cmap="RdBu_r", vmin=-bound, vmax=bound)
        for row, values in enumerate(methods[name]["matrix"][1:]):
            for column, value in enumerate(values):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set(title=name, xlabel="bits per byte of")
        axis.set_xticks(range(len(domains)), domains, rotation=45, ha="right")
        axis.set_yticks(range(len(domains)), domains)
    axes[0].set_ylabel("after")
    figure.colorbar(image, ax=list(axes[:-1]), label="change since the start", shrink=0.6)
    last = axes[-1]
    for name, one in methods.items():
        style = "-" if name in ("frozen", "naive", "joint", "replay", "ours") else ":"
        last.plot([float(np.mean(row)) for row in one["matrix"]], style, label=name)
    last.set(title="average of all domains", ylabel="bits per byte")
    last.set_xticks(range(len(domains) + 1), ["nothing", *domains], rotation=45, ha="right")
    last.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _change(method: Mapping[str, Any]) -> Any:
    matrix = np.array(method["matrix"])
    return matrix[1:] - matrix[0]
