"""The chart expertmesh-serve, rendered for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from cluster.config import Config, load_config
from tests.charts.helm import CHARTS, Helm, Object, one

CHART: Final = "expertmesh-serve"
CI: Final = CHARTS / CHART / "ci"
KEYS: Final = {"EXPERTMESH_API_KEY": "an api key", "EXPERTMESH_ADMIN_KEY": "an admin key"}
# Rendered by one helm: that the other renders the same is looked at in test_charts.py.
HELM: Final = Helm(4)


def render(example: str = "cpu", values: dict[str, Any] | None = None, **options: Any) -> list[Object]:
    """The objects of one of the chart's examples, with other values over it."""
    return HELM.template(CHART, [CI / f"{example}-values.yaml"], values, **options)


def cluster(objects: list[Object]) -> dict[str, Any]:
    """The RayCluster's spec."""
    return one(objects, "RayService")["spec"]["rayClusterConfig"]


def groups(objects: list[Object]) -> dict[str, dict[str, Any]]:
    """Its worker groups by name."""
    return {group["groupName"]: group for group in cluster(objects)["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    """The only container of a group's pods."""
    (found,) = group["template"]["spec"]["containers"]
    return found


def config(objects: list[Object], folder: Path) -> Config:
    """What the program makes of the ConfigMap, written into the folder."""
    name = one(objects, "RayService")["metadata"]["name"]
    file = folder / "expertmesh.yaml"
    file.write_text(one(objects, "ConfigMap", name)["data"]["expertmesh.yaml"])
    return load_config(file, {}, KEYS).config
