"""The table of renderings: each chart × its `ci/*-values.yaml` × the switches in its `ci/switches.yaml`.

A chart joins by having the files; values that a switch is not for are left out by naming them under `not` there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.charts.helm import CHARTS, Helm, Object

PLAIN = "plain"


@dataclass(frozen=True)
class Row:
    """One rendering."""

    chart: str
    file: Path
    switch: str
    values: Mapping[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return f"{self.chart}-{self.file.stem.removesuffix('-values')}-{self.switch}"

    def render(self, helm: Helm) -> list[Object]:
        """The objects; Refused if helm refuses."""
        return helm.template(self.chart, [self.file], self.values)


def charts() -> list[str]:
    """The names of all charts."""
    return sorted(file.parent.name for file in CHARTS.glob("*/Chart.yaml"))


def value_files(chart: str) -> list[Path]:
    """The chart's examples of values, which tests and `helm lint` go through."""
    return sorted((CHARTS / chart / "ci").glob("*-values.yaml"))


def rows() -> list[Row]:
    """All of the table."""
    found = []
    for chart in charts():
        for file in value_files(chart):
            found.append(Row(chart, file, PLAIN, {}))
            found += [Row(chart, file, name, values) for name, values in switches(chart, file).items()]
    return found


def switches(chart: str, file: Path) -> dict[str, Mapping[str, Any]]:
    """What is switched beside these values, by name."""
    given = CHARTS / chart / "ci" / "switches.yaml"
    known = yaml.safe_load(given.read_text()) if given.is_file() else {}
    found = {}
    for name, values in known.items():
        excluded = values.pop("not", [])
        if file.stem.removesuffix("-values") not in excluded:
            found[name] = values
    return found
