"""Running helm on the project's charts; each rendering is made once per process."""

from __future__ import annotations

import atexit
import copy
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.charts.tools import helm_binary

ROOT: Final = Path(__file__).resolve().parents[2]
CHARTS: Final = ROOT / "helm"
RELEASE: Final = "mesh"
NAMESPACE: Final = "models"
# What a cluster of today says it is; templates may look at it.
KUBERNETES: Final = "1.34.0"

Object = dict[str, Any]


class _Loader(yaml.CSafeLoader):
    """As the API server reads YAML: a key that is there twice is a mistake, where PyYAML takes the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_objects(text: str) -> list[Object]:
    """The objects of a YAML stream; yaml.YAMLError for what is none, or has a key twice."""
    return [found for found in yaml.load_all(text, Loader=_Loader) if found is not None]


class Refused(Exception):
    """helm would not; the text is what it wrote."""


@lru_cache(maxsize=1)
def _home() -> str:
    # Nothing of the user's: no repositories, plug-ins, kubeconfig.
    folder = tempfile.mkdtemp(prefix="expertmesh-helm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Helm:
    """One helm binary."""

    major: int

    @cached_property
    def binary(self) -> Path:
        return helm_binary(self.major)

    def run(self, *arguments: str, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """What it prints; Refused with what it says if it fails."""
        environment = {"HOME": _home(), "PATH": os.environ.get("PATH", "")}
        if kubeconfig is not None:
            environment["KUBECONFIG"] = str(kubeconfig)
        done = subprocess.run(
            [str(self.binary), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        if done.returncode:
            raise Refused(done.stdout + done.stderr)
        return done.stdout

    def template(
        self,
        chart: str,
        files: Sequence[Path] = (),
        values: Mapping[str, Any] | None = None,
        *,
        release: str = RELEASE,
        namespace: str = NAMESPACE,
        kubernetes: str = KUBERNETES,
    ) -> list[Object]:
        """The rendered objects, hooks and tests included; the caller may change them. Refused if helm refuses."""
        text = self.rendered(
            chart, files, values, release=release, namespace=namespace, kubernetes=kubernetes
        )
        return copy.deepcopy(_parsed(text))

    def rendered(
        self,
        chart: str,
        files: Sequence[Path] = (),
        values: Mapping[str, Any] | None = None,
        *,
        release: str = RELEASE,
        namespace: str = NAMESPACE,
        kubernetes: str = KUBERNETES,
    ) -> str:
        """The rendered YAML as it is."""
        found = _rendered(self, chart, tuple(files), json.dumps(values or {}), release, namespace, kubernetes)
        if isinstance(found, Refused):
            raise found
        return found

    def lint(self, chart: str, files: Sequence[Path] = ()) -> str:
        """What `helm lint --strict` says; Refused if it found something."""
        arguments = [part for file in files for part in ("--values", str(file))]
        return self.run("lint", "--strict", str(CHARTS / chart), *arguments)


@cache
def _rendered(
    helm: Helm,
    chart: str,
    files: tuple[Path, ...],
    values: str,
    release: str,
    namespace: str,
    kubernetes: str,
) -> str | Refused:
    arguments = ["template", release, str(CHARTS / chart), "--namespace", namespace]
    arguments += ["--kube-version", kubernetes]
    for file in files:
        arguments += ["--values", str(file)]
    # JSON is YAML; from standard input, so that no file is left.
    arguments += ["--values", "-"]
    try:
        return helm.run(*arguments, stdin=values)
    except Refused as refused:
        return refused


@cache
def _parsed(text: str) -> list[Object]:
    return load_objects(text)


def of_kind(objects: Sequence[Object], kind: str) -> list[Object]:
    """Those of one kind."""
    return [found for found in objects if found["kind"] == kind]


def one(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    """The only one of its kind, or of that name among them; AssertionError if there is not exactly one."""
    found = [item for item in of_kind(objects, kind) if name in (None, item["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} × {kind} {name or ''} among {[names(o) for o in objects]}"
    return found[0]


def names(item: Object) -> str:
    """Kind and name, for messages."""
    return f"{item['kind']}/{item['metadata'].get('name')}"
