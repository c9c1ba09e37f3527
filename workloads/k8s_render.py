"""What the charts make of values, as `helm template` says; no cluster is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from cluster.errors import ExpertmeshError

CHARTS: Final = ("serve", "learn", "operator")
NAMESPACE: Final = "expertmesh"
_RENDER_S: Final = 120.0
_ROOT: Final = Path(__file__).parents[1]


class HelmError(ExpertmeshError):
    """There is no helm, no such chart or overlay, or helm refuses the values."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be rendered of one chart."""

    chart: str
    """One of CHARTS."""
    overlay: str | None = None
    """Folder of `k8s/overlays` whose values come first."""
    values: tuple[Path, ...] = ()
    sets: tuple[str, ...] = ()
    release: str | None = None
    namespace: str = NAMESPACE
    kube_version: str | None = None

    @property
    def name(self) -> str:
        """Of the release: its chart's where nothing else is said."""
        return self.release or f"expertmesh-{self.chart}"


def helm_program(environ: Mapping[str, str] = os.environ) -> str:
    """The installed helm, or the one that HELM names. HelmError if there is none."""
    named = environ.get("HELM") or "helm"
    found = shutil.which(named, path=environ.get("PATH"))
    if found is None:
        raise HelmError(
            f"there is no {named}" if environ.get("HELM") else "helm is not installed, or not on the PATH",
            "install helm 3.17 or later, or name it: HELM=/path/to/helm expertmesh k8s ...",
        )
    return found


def sources(folder: Path | None = None) -> Path:
    """The folder with `helm/` and `k8s/` in it. HelmError if they are not there."""
    root = folder or _ROOT
    if not (root / "helm").is_dir():
        raise HelmError(
            f"{root} has no folder helm with the charts",
            "run this in a checkout of the project, or name one with --source FOLDER",
        )
    return root


def values_files(root: Path, wanted: Wanted) -> list[Path]:
    """Of the overlay, then those that were given. HelmError if there is no such overlay or file."""
    files: list[Path] = []
    if wanted.overlay is not None:
        overlays = root / "k8s" / "overlays"
        if not (overlays / wanted.overlay).is_dir():
            known = ", ".join(sorted(one.name for one in overlays.glob("*") if one.is_dir()))
            raise HelmError(f"there is no overlay {wanted.overlay}", f"there are: {known}")
        own = overlays / wanted.overlay / "values" / f"{wanted.chart}.yaml"
        # An overlay may leave a chart as it is.
        files += [own] if own.exists() else []
    for file in wanted.values:
        if not file.exists():
            raise HelmError(f"there is no values file {file}", "give the path of a YAML file")
        files.append(file)
    return files


def helm_arguments(root: Path, wanted: Wanted) -> list[str]:
    """Of `helm template`."""
    chart = root / "helm" / f"expertmesh-{wanted.chart}"
    if not (chart / "Chart.yaml").exists():
        raise HelmError(f"there is no chart {chart}", f"charts are {', '.join(CHARTS)}")
    arguments = ["template", wanted.name, str(chart), "--namespace", wanted.namespace]
    for file in values_files(root, wanted):
        arguments += ["--values", str(file)]
    for one in wanted.sets:
        arguments += ["--set", one]
    if wanted.kube_version:
        arguments += ["--kube-version", wanted.kube_version]
    return arguments


def render(root: Path, wanted: Wanted, environ: Mapping[str, str] = os.environ) -> str:
    """The manifests, as YAML. HelmError with what helm says."""
    program, arguments = helm_program(environ), helm_arguments(root, wanted)
    try:
        ended = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=_RENDER_S,
            env={**environ},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HelmError(f"{program} can't be run: {error}", "see whether `helm version` works") from error
    if ended.returncode:
        raise HelmError(
            f"helm refuses expertmesh-{wanted.chart}: {told(ended.stderr)}",
            f"helm/expertmesh-{wanted.chart}/README.md says what each value means",
        )
    return ended.stdout


def told(stderr: str) -> str:
    """What helm says is wrong, without its prefixes and warnings."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("WARNING", "level=", "I0", "W0"))]
    return " ".join(lines).removeprefix("Error: ") or "it says nothing"


def documents(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a rendering, empty ones left out."""
    for document in yaml.safe_load_all(text):
        if document:
            yield document


def is_test(document: Mapping[str, Any]) -> bool:
    """Whether it is only made by `helm test`."""
    annotations = document.get("metadata", {}).get("annotations") or {}
    return "test" in str(annotations.get("helm.sh/hook", ""))


def written(folder: Path, rendered: Mapping[str, str]) -> Sequence[Path]:
    """Put each chart's manifests into a file of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart, text in rendered.items():
        file = folder / f"{chart}.yaml"
        file.write_text(text, "utf-8")
        files.append(file)
    return files
