"""Rules that charts are held against, each seen to bite: security, selectors, series, and where the tools come from."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.charts import tools
from tests.charts.other_kinds import other_problems
from tests.charts.pod_security import security_problems
from tests.charts.prometheus_series import series
from tests.charts.selectors import matches

Change = Callable[[dict[str, Any]], Any]


def _set(within: Callable[[dict[str, Any]], dict[str, Any]], **changes: Any) -> Change:
    return lambda item: within(item).update(changes)


def test_kinds_of_other_projects() -> None:
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "a"},
        "spec": {"rules": [{"backendRefs": [{"name": "a", "port": 80}]}]},
    }
    assert other_problems(route) == []
    assert other_problems({**route, "spec": {"hosts": ["a"]}})
    assert other_problems({**route, "kind": "TCPRoute"}) is None


def _deployment() -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "a"},
        "spec": {
            "template": {
                "spec": {
                    "automountServiceAccountToken": False,
                    "serviceAccountName": "a",
                    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [
                        {
                            "name": "a",
                            "image": "registry.example:5000/a:1.0",
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "readOnlyRootFilesystem": True,
                                "capabilities": {"drop": ["ALL"]},
                            },
                            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
                        }
                    ],
                }
            }
        },
    }


def _box(item: dict[str, Any]) -> dict[str, Any]:
    return item["spec"]["template"]["spec"]["containers"][0]


def _of_pod(item: dict[str, Any]) -> dict[str, Any]:
    return item["spec"]["template"]["spec"]


_SECURITY: dict[str, tuple[Change, str]] = {
    "root": (lambda item: _of_pod(item)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
    "user 0": (lambda item: _of_pod(item)["securityContext"].update(runAsUser=0), "root"),
    "no seccomp": (lambda item: _of_pod(item)["securityContext"].pop("seccompProfile"), "seccompProfile"),
    "the host's network": (_set(_of_pod, hostNetwork=True), "hostNetwork"),
    "the host's files": (_set(_of_pod, volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "hostPath"),
    "a token": (lambda item: _of_pod(item).pop("automountServiceAccountToken"), "token"),
    "a token by a volume": (
        _set(
            _of_pod,
            volumes=[{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}],
        ),
        "token",
    ),
    "escalation": (lambda item: _box(item)["securityContext"].pop("allowPrivilegeEscalation"), "Escalation"),
    "a root that is written": (
        lambda item: _box(item)["securityContext"].update(readOnlyRootFilesystem=False),
        "readOnlyRootFilesystem",
    ),
    "capabilities": (
        lambda item: _box(item)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        "keeps",
    ),
    "privileged": (lambda item: _box(item)["securityContext"].update(privileged=True), "privileged"),
    "no limit": (lambda item: _box(item)["resources"]["limits"].pop("memory"), "limit of memory"),
    "latest": (_set(_box, image="registry.example:5000/a:latest"), "no certain version"),
    "no tag": (_set(_box, image="registry.example:5000/a"), "no certain version"),
    "a port of the host's": (_set(_box, ports=[{"containerPort": 1, "hostPort": 1}]), "hostPort"),
    "an init container": (_set(_of_pod, initContainers=[{"name": "i", "image": "a:1"}]), "container i"),
}


@pytest.mark.parametrize("case", _SECURITY)
def test_security_rules(case: str) -> None:
    change, told = _SECURITY[case]
    item = _deployment()
    assert security_problems([item]) == []
    change(item)
    assert any(told in problem for problem in security_problems([item])), security_problems([item])


def test_a_token_is_for_accounts_that_may_do_something() -> None:
    item = _deployment()
    _of_pod(item)["automountServiceAccountToken"] = True
    subject = {"kind": "ServiceAccount", "name": "a"}
    binding = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "a"}}
    assert security_problems([item, {**binding, "subjects": [subject]}]) == []
    assert security_problems([item, {**binding, "subjects": [{**subject, "name": "b"}]}])


def test_selectors() -> None:
    labels = {"a": "1", "b": "2"}
    assert matches({}, labels)
    assert matches({"matchLabels": {"a": "1"}}, labels)
    assert not matches({"matchLabels": {"a": "1", "c": "3"}}, labels)
    for operator, values, expected in (
        ("In", ["1", "2"], True),
        ("NotIn", ["1"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ):
        expression = {"key": "a", "operator": operator, "values": values}
        assert matches({"matchExpressions": [expression]}, labels) is expected


def test_series_of_expressions() -> None:
    expression = 'sum by (pod) (rate(vllm:x_total{namespace="up",pod=~"a{2}"}[5m])) / on(pod) up > bool 0.5'
    assert series(expression) == {"vllm:x_total", "up"}
    assert series('absent(up{service="a"} == 1) and vector(1)') == {"up"}
    with pytest.raises(ValueError):
        series("sum(up")


def _wheel() -> bytes:
    """As the packages that carry helm and kubectl are made."""

    def zipped(files: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return buffer.getvalue()

    layer = zipped({"helm/helm": b"#!/bin/sh\necho v3\n", "kubectl/kubectl": b"", "awscli/other": b""})
    bundle = io.BytesIO()
    with tarfile.open(fileobj=bundle, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/lib/layer.zip")
        entry.size = len(layer)
        archive.addfile(entry, io.BytesIO(layer))
    return zipped({"aws_cdk/layer/_jsii/layer@1.jsii.tgz": bundle.getvalue()})


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """pip's command lines; each download brings the same wheel."""
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        (Path(command[command.index("--dest") + 1]) / "layer-1-py3-none-any.whl").write_bytes(_wheel())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tools.subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_tools_are_unpacked_once(downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    package = tools.Package("layer-v31", "1", hashlib.sha256(_wheel()).hexdigest())
    monkeypatch.setattr(tools, "_OLD", package)
    found = tools.helm_binary(3)
    assert found == tools.helm_binary(3) and len(downloads) == 1
    assert found.read_text().startswith("#!/bin/sh") and found.stat().st_mode & 0o111
    assert sorted(file.name for file in found.parent.iterdir()) == ["helm", "kubectl"]
    assert "layer-v31==1" in downloads[0] and "--no-deps" in downloads[0]


def test_a_tool_of_another_digest_is_not_run(
    downloads: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tools.Package("layer-v31", "1", "0" * 64)
    monkeypatch.setattr(tools, "_OLD", package)
    with pytest.raises(AssertionError, match="sha256"):
        tools.helm_binary(3)
    assert not package.folder.exists()
