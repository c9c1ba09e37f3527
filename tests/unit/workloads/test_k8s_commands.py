"""`expertmesh k8s ...` as a user meets it: messages and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.workloads.kube_documents import CRD, Documents, well
from workloads import cli, k8s_commands

Changed = Callable[[Documents], None]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "HELM", "JOB_NAME", "JOB_UID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["expertmesh", "k8s", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return Ended(int(ended.value.code or 0), written.out, written.err)

    return call


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Documents:
    api = well()
    monkeypatch.setattr(k8s_commands, "_connected", lambda kubeconfig, context: api)
    return api


@pytest.fixture
def helm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in helm's place that writes this."""

    def put(text: str) -> None:
        (tmp_path / "rendered.yaml").write_text(text)
        program = tmp_path / "helm"
        program.write_text(f"#!/bin/sh\ncat {tmp_path}/rendered.yaml\n")
        program.chmod(0o755)
        monkeypatch.setenv("HELM", str(program))

    return put


CONFIG_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\ndata: {a: b}\n"


def test_without_a_cluster_each_command_says_so(
    run: Callable[..., Ended], helm: Callable[[str], None]
) -> None:
    pytest.importorskip("kubernetes")
    helm(CONFIG_MAP)
    for arguments, code in ((["doctor"], 1), (["diff", "learn"], 2)):
        ended = run(*arguments)
        assert ended.code == code
        assert "no cluster is configured here" in ended.err and "--kubeconfig" in ended.err
        assert (ended.out, ended.err.count("error:")) == ("", 1)


def test_without_helm_rendering_says_so(run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELM", "/nowhere/helm")
    ended = run("render", "learn", "--overlay", "dev")
    assert ended.code == 1 and "there is no /nowhere/helm" in ended.err
    assert run("diff", "learn").code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("render", "other"), "there is no chart other"),
        (("render", "--set", "a=b"), "--set is of one chart"),
        (("render", "learn", "--overlay", "huge"), "there are: dev, gpu, mixed"),
    ],
)
def test_a_mistake_is_one_message(
    run: Callable[..., Ended], helm: Callable[[str], None], arguments: tuple[str, ...], words: str
) -> None:
    helm("")
    ended = run(*arguments)
    assert ended.code == 1 and words in ended.err.replace("\n", " ")


def test_rendering_is_printed_or_written(
    run: Callable[..., Ended], helm: Callable[[str], None], tmp_path: Path
) -> None:
    helm(CONFIG_MAP)
    assert run("render", "learn").out == CONFIG_MAP
    ended = run("render", "learn", "--output", str(tmp_path / "made"))
    assert ended.out == ""
    assert (tmp_path / "made" / "learn.yaml").read_text() == CONFIG_MAP


def test_diff_says_by_its_exit_code_whether_anything_would_change(
    run: Callable[..., Ended], helm: Callable[[str], None], cluster: Documents
) -> None:
    helm(CONFIG_MAP)
    cluster.found["/api/v1"] = {
        "resources": [{"name": "configmaps", "kind": "ConfigMap", "namespaced": True}]
    }
    ended = run("diff", "learn")
    assert ended.code == 1
    assert "+  a: b" in ended.out and "create ConfigMap one" in ended.err
    cluster.found["/api/v1/namespaces/expertmesh/configmaps/one"] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "one"},
        "data": {"a": "b"},
    }
    ended = run("diff", "learn")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    helm("apiVersion: ray.io/v1\nkind: RayService\nmetadata: {name: one}\n")
    ended = run("diff", "learn")
    assert ended.code == 2 and "has no RayService" in ended.err


def test_doctor_ends_with_1_only_if_something_must_be_mended(
    run: Callable[..., Ended], cluster: Documents
) -> None:
    ended = run("doctor")
    assert ended.code == 0, ended.out
    assert "https://cluster.test, namespace expertmesh" in ended.out
    del cluster.found[f"{CRD}/httproutes.gateway.networking.k8s.io"]
    assert run("doctor").code == 0
    del cluster.found[f"{CRD}/rayjobs.ray.io"]
    ended = run("doctor", "--json")
    assert ended.code == 1
    told = json.loads(ended.out)
    assert [one["name"] for one in told["findings"] if one["status"] == "fail"] == ["crd rayjobs"]


def test_submitting_is_told_and_fails_with_the_round(
    run: Callable[..., Ended], cluster: Documents, tmp_path: Path
) -> None:
    file = tmp_path / "rayjob.yaml"
    file.write_text("apiVersion: ray.io/v1\nkind: RayJob\nspec: {}\n")
    path = "/apis/ray.io/v1/namespaces/expertmesh/rayjobs/r"
    assert run("submit", str(file), "--name", "r", "--no-wait").out == "r is created\n"
    cluster.found[path]["status"] = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    ended = run("submit", str(file), "--name", "r")
    assert ended.code == 0 and ended.out == "r is there already\nr has ended: SUCCEEDED\n"
    cluster.found[path]["status"] = {"jobDeploymentStatus": "Failed", "message": "out of memory"}
    ended = run("submit", str(file), "--name", "r")
    assert ended.code == 1 and "the RayJob r failed: out of memory" in ended.err
    # Of the cluster, not of the round: that may be tried again.
    cluster.forbidden.add("/apis/ray.io/v1/namespaces/expertmesh/rayjobs")
    assert run("submit", str(file), "--name", "other").code == 2
    assert run("submit", str(tmp_path / "absent"), "--name", "r").code == 1


def test_nodes_are_shown_by_class(run: Callable[..., Ended], cluster: Documents) -> None:
    shown, told = run("nodes"), run("nodes", "--json")
    assert shown.code == told.code == 0 and "device" in shown.out
    classes = json.loads(told.out)
    there = cluster.get("/api/v1/nodes")
    assert there is not None and there["items"]
    assert sorted(name for one in classes for name in one["nodes"]) == sorted(
        item["metadata"]["name"] for item in there["items"]
    )
