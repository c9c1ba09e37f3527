"""`expertmesh k8s doctor`, `diff` and `submit` against a real API server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kube_errors import ForbiddenError, KubeError
from tests.charts.helm import ROOT, Helm, Object, load_objects, of_kind, one
from tests.e2e.programs import wait_for
from tests.integration.test_k8s_rendered import platform
from tests.kube_api_server import CRDS
from tests.kube_api_server import kube_api_server as kube_api_server
from workloads.k8s_api import HttpApi, connect
from workloads.k8s_checks import Finding
from workloads.k8s_diff import Change, changes
from workloads.k8s_doctor import Asked, findings
from workloads.k8s_kinds import Kinds
from workloads.k8s_submit import Owner, await_end, ray_job, submit

NAMESPACE = "expertmesh"
CHART = "expertmesh-learn"
# With KubeRay's own schedule: an API server of 1.20 has no CronJob of batch/v1.
VALUES = ROOT / "helm" / CHART / "ci" / "raycronjob-values.yaml"
RELEASE = "learn"


@pytest.fixture(scope="module")
def api(kube_api_server: Path) -> Iterator[HttpApi]:
    """The cluster as its admin, with KubeRay's CRDs, the base of k8s/ and some nodes."""
    found = connect(kube_api_server)
    for file in sorted(CRDS.glob("*.json")):
        put(found, json.loads(file.read_text()))
    for item in load_objects(platform("dev")):
        put(found, item)
    for item in surroundings():
        put(found, item)
    yield found


def put(api: HttpApi, item: Object) -> Object:
    """Make it, or make it so, as helm 4 would."""
    path = Kinds(api).of(item).path(NAMESPACE, item["metadata"]["name"])
    made = api._answer(
        "PATCH",
        path,
        {"fieldManager": "helm", "force": "true"},
        json.dumps(item),
        "application/apply-patch+yaml",
    )
    assert made is not None, path
    if "status" in item:
        body = json.dumps({"status": item["status"]})
        api._answer("PATCH", f"{path}/status", {}, body, "application/merge-patch+json")
    return made


def surroundings() -> list[Object]:
    """What others bring: nodes, a storage class, keys, KubeRay's operator as far as it can be seen."""
    ready = [{"type": "Ready", "status": "True"}]
    nodes = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": f"doctor-{name}"},
            # To be counted; pods of other tests are to stay away.
            "spec": {"taints": [{"key": "example.com/doctor", "effect": "NoSchedule"}]},
            "status": {"allocatable": {"cpu": "8", "memory": "32Gi", **gpus}, "conditions": ready},
        }
        for name, gpus in (("cpu", {}), ("gpu", {"nvidia.com/gpu": "4"}))
    ]
    box = {"name": "operator", "image": "kuberay/operator:v1.7.0", "args": [f"--watch-namespace={NAMESPACE}"]}
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    operator = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "kuberay-operator", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [box]}},
        },
        "status": {"readyReplicas": 1, "replicas": 1},
    }
    storage = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "fast",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "example.com/none",
    }
    keys = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "expertmesh-keys"},
        "stringData": {"EXPERTMESH_API_KEY": "a", "EXPERTMESH_ADMIN_KEY": "b"},
    }
    return [*nodes, operator, storage, keys]


@pytest.fixture
def as_user(kube_api_server: Path) -> Callable[..., HttpApi]:
    """The same cluster as somebody else."""

    def connected(name: str, *groups: str) -> HttpApi:
        found = connect(kube_api_server)
        found._client.headers.update({"Impersonate-User": name})
        if groups:
            found._client.headers.update({"Impersonate-Group": groups[0]})
        return found

    return connected


def examined(api: HttpApi, namespace: str = NAMESPACE) -> dict[str, Finding]:
    return {one.name: one for one in findings(api, Asked(namespace))}


def test_the_doctor_finds_all_but_a_kubernetes_that_is_new_enough(api: HttpApi) -> None:
    found = examined(api)
    assert {name: one.status for name, one in found.items() if one.status != "ok"} == {
        "kubernetes": "fail",
        "gateway api": "warn",
        "monitors": "warn",
    }
    assert "v1.20" in found["kubernetes"].found
    assert found["crd rayservices"].found == "v1, of KubeRay 1.7 or later"
    assert found["gpus"].found.endswith("are tainted")


def test_the_doctor_finds_what_is_wanting_elsewhere(api: HttpApi) -> None:
    found = examined(api, "nowhere")
    wanting = {name for name, one in found.items() if one.status == "fail"}
    assert wanting == {"kubernetes", "namespace", "kuberay", "secret expertmesh-keys"}


def test_the_installers_role_is_enough_for_every_chart(api: HttpApi, as_user: Callable[..., HttpApi]) -> None:
    installs = ("install serve", "install learn", "install operator")
    may = examined(as_user("jane", "expertmesh-installers"))
    assert {name: may[name].status for name in installs} == dict.fromkeys(installs, "ok")
    # Of what is the whole cluster's, a namespace's installer sees nothing.
    assert may["nodes"].status == "warn" and "can't be looked at" in may["nodes"].found
    may_not = examined(as_user("joe", "others"))
    assert {may_not[name].status for name in installs} == {"fail"}
    assert "rayservices" in may_not["install serve"].found


def rendering(**values: Any) -> list[Object]:
    return Helm(4).template(CHART, [VALUES], values, release=RELEASE, namespace=NAMESPACE)


def differing(api: HttpApi, objects: list[Object]) -> list[Change]:
    return list(changes(api, objects, NAMESPACE, RELEASE))


def test_a_diff_shows_what_would_change_and_changes_nothing(api: HttpApi) -> None:
    wanted = rendering()
    before = differing(api, wanted)
    assert {change.action for change in before} == {"create"}
    assert len(before) == len(wanted)
    assert len(differing(api, wanted)) == len(wanted), "a trial made something"
    for item in wanted:
        put(api, item)
    # What the server fills in is no difference.
    assert differing(api, wanted) == []
    (change,) = differing(api, rendering(schedule="1 2 3 4 5"))
    assert (change.action, change.kind) == ("change", "RayCronJob")
    lines = [line for line in change.text.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert lines == ["-  schedule: '@daily'", "+  schedule: 1 2 3 4 5"]
    # An object that is no longer wanted.
    more = {**one(wanted, "ConfigMap"), "metadata": {**one(wanted, "ConfigMap")["metadata"], "name": "old"}}
    put(api, more)
    assert [(change.action, change.name) for change in differing(api, wanted)] == [("remove", "old")]


def test_a_field_that_is_no_longer_set_shows(api: HttpApi) -> None:
    with_zone, without = (
        rendering(fullnameOverride="zoned", timeZone="Etc/UTC"),
        rendering(fullnameOverride="zoned"),
    )
    for item in with_zone:
        put(api, item)
    (change,) = [found for found in differing(api, without) if found.action == "change"]
    assert "-  timeZone: Etc/UTC" in change.text


def test_what_the_server_refuses_is_said(api: HttpApi) -> None:
    wrong = one(rendering(), "RayCronJob")
    wrong["spec"]["jobTemplate"]["submissionMode"] = 7
    with pytest.raises(KubeError, match="submissionMode"):
        differing(api, [wrong])
    cron = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "x"}, "spec": {}}
    with pytest.raises(KubeError, match="has no CronJob of batch/v1"):
        differing(api, [cron])


@pytest.fixture(scope="module")
def round_manifest() -> Object:
    values = ROOT / "helm" / CHART / "ci" / "folders-values.yaml"
    objects = Helm(4).template(CHART, [values], {}, release="rounds", namespace=NAMESPACE)
    data = next(item["data"] for item in of_kind(objects, "ConfigMap") if "rayjob.yaml" in item["data"])
    return {
        "job": yaml.safe_load(data["rayjob.yaml"]),
        "rbac": [item for item in objects if item["kind"] in ("Role", "RoleBinding")],
        "account": one(objects, "ServiceAccount")["metadata"]["name"],
    }


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ForbiddenError:
        return True
    return False


def test_the_submitter_does_with_its_rights_what_it_can_do_with_no_fewer(
    api: HttpApi, as_user: Callable[..., HttpApi], round_manifest: Object
) -> None:
    for item in round_manifest["rbac"]:
        put(api, item)
    submitter = as_user(f"system:serviceaccount:{NAMESPACE}:{round_manifest['account']}")
    path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs/rounds-1"
    wait_for(lambda: not refused(lambda: submitter.get(path)), 10, "the role")
    job = ray_job(round_manifest["job"], "rounds-1", NAMESPACE, Owner("rounds-1", "0-1-2"))
    assert submit(submitter, job)
    assert not submit(submitter, job)
    made = api.get(path)
    assert made is not None
    # Nothing of it was dropped by the schema, and it goes with its Job.
    assert made["spec"]["rayClusterSpec"].items() >= {"authOptions": {"mode": "token"}}.items()
    assert made["metadata"]["ownerReferences"][0]["uid"] == "0-1-2"
    status = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    body = json.dumps({"status": status})
    api._answer("PATCH", f"{path}/status", {}, body, "application/merge-patch+json")
    assert await_end(submitter, NAMESPACE, "rounds-1", 10).succeeded
    with pytest.raises(ForbiddenError):
        submitter.get(f"/api/v1/namespaces/{NAMESPACE}/secrets")
    role = one(round_manifest["rbac"], "Role")
    for verb, fails in (
        ("create", lambda: submit(submitter, {**job, "metadata": {**job["metadata"], "name": "rounds-2"}})),
        ("get", lambda: submitter.get(path)),
    ):
        (rule,) = role["rules"]
        fewer = {**role, "rules": [{**rule, "verbs": [one for one in rule["verbs"] if one != verb]}]}
        put(api, fewer)
        # The server's authoriser learns of it a moment later.
        wait_for(lambda fails=fails: refused(fails), 10, f"{verb} is refused")
    put(api, role)
