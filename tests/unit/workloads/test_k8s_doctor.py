"""`expertmesh k8s doctor` over clusters that lack one thing each."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from rich.console import Console

from tests.unit.workloads.kube_documents import CRD, Documents, crd, node, operator, storage_class, well
from workloads import k8s_checks as checks
from workloads.k8s_doctor import Asked, as_json, as_table, findings

Change = Callable[[Documents], None]
ASKED = Asked("expertmesh")


def examined(change: Change = lambda api: None) -> dict[str, checks.Finding]:
    api = well()
    change(api)
    return {one.name: one for one in findings(api, ASKED)}


def put(path: str, document: object) -> Change:
    def change(api: Documents) -> None:
        api.found[path] = document  # type: ignore[assignment]

    return change


def gone(path: str) -> Change:
    def change(api: Documents) -> None:
        del api.found[path]

    return change


def test_a_cluster_that_has_all_is_well() -> None:
    found = examined()
    assert {name for name, one in found.items() if one.status != "ok"} == set()
    assert found["gpus"].found == "8 on 1 nodes, 1 of which are tainted"
    assert found["nodes"].found == "2 of 2 take pods, 15 cores"
    assert found["gateway api"].found == "installed, v1.4.0"
    assert found["gate RayCronJob"].found.startswith("off")
    assert found["gate RayServiceIncrementalUpgrade"].found.startswith("on")


@pytest.mark.parametrize(
    ("change", "name", "status", "words"),
    [
        (put("/version", {"gitVersion": "v1.28.9"}), "kubernetes", "fail", "1.29"),
        (put("/version", {"gitVersion": "v1.38.0"}), "kubernetes", "warn", "1.37"),
        (put("/version", {"gitVersion": "dev"}), "kubernetes", "warn", "no version"),
        (gone("/api/v1/namespaces/expertmesh"), "namespace", "fail", "does not exist"),
        (put("/api/v1/namespaces/expertmesh", {"metadata": {}}), "namespace", "warn", "enforce=restricted"),
        (gone(f"{CRD}/rayservices.ray.io"), "crd rayservices", "fail", "k8s/kuberay/README.md"),
        (gone(f"{CRD}/raycronjobs.ray.io"), "crd raycronjobs", "warn", "scheduler: RayCronJob"),
        (put(f"{CRD}/rayjobs.ray.io", crd("rayjobs")), "crd rayjobs", "fail", "before 1.7"),
        (
            put(f"{CRD}/rayclusters.ray.io", crd("rayclusters", version="v1alpha1")),
            "crd rayclusters",
            "fail",
            "not v1",
        ),
        (put("/apis/apps/v1/deployments", {"items": []}), "kuberay", "fail", "no operator"),
        (put("/apis/apps/v1/deployments", {"items": [operator("v1.6.2")]}), "kuberay", "fail", "is 1.6"),
        (put("/apis/apps/v1/deployments", {"items": [operator(ready=0)]}), "kuberay", "fail", "not ready"),
        (put("/apis/apps/v1/deployments", {"items": [operator("nightly")]}), "kuberay", "warn", "nightly"),
        (
            put("/apis/apps/v1/deployments", {"items": [operator("v1.7.1", "--watch-namespace=other,more")]}),
            "kuberay",
            "fail",
            "does not watch the namespace expertmesh",
        ),
        (put("/api/v1/nodes", {"items": [node("a", ready=False)]}), "nodes", "fail", "none of 1"),
        (put("/api/v1/nodes", {"items": [node("a")]}), "gpus", "warn", "overlay dev"),
        (put("/api/v1/nodes", {"items": [node("a", present=True)]}), "gpus", "fail", "device plugin"),
        (
            put("/apis/storage.k8s.io/v1/storageclasses", {"items": [storage_class("slow")]}),
            "storage",
            "warn",
            "there are: slow",
        ),
        (
            put(
                "/apis/storage.k8s.io/v1/storageclasses",
                {"items": [storage_class("a", default=True), storage_class("b", default=True)]},
            ),
            "storage",
            "warn",
            "all but one",
        ),
        (
            gone("/api/v1/namespaces/expertmesh/secrets/expertmesh-keys"),
            "secret expertmesh-keys",
            "fail",
            "kubectl create secret generic expertmesh-keys",
        ),
        (
            put(
                "/api/v1/namespaces/expertmesh/secrets/expertmesh-keys",
                {"data": {"EXPERTMESH_API_KEY": "YQ==", "EXPERTMESH_ADMIN_KEY": ""}},
            ),
            "secret expertmesh-keys",
            "fail",
            "lacks EXPERTMESH_ADMIN_KEY",
        ),
        (
            put(
                "/apis/ray.io/v1/namespaces/expertmesh/rayclusters",
                {"items": [{"metadata": {"name": "open"}, "spec": {}}]},
            ),
            "token of open",
            "fail",
            "run code",
        ),
        (gone("/api/v1/namespaces/expertmesh/secrets/mesh-x"), "token of mesh-x", "warn", "KubeRay makes it"),
        (gone(f"{CRD}/httproutes.gateway.networking.k8s.io"), "gateway api", "warn", "Ingress"),
        (gone(f"{CRD}/servicemonitors.monitoring.coreos.com"), "monitors", "warn", "/metrics"),
        (
            lambda api: api.refused.add(("create", "rayservices")),
            "install serve",
            "fail",
            "create rayservices",
        ),
        (lambda api: api.refused.add(("patch", "roles")), "install learn", "fail", "patch roles"),
        (lambda api: api.forbidden.add("/api/v1/nodes"), "nodes", "warn", "can't be looked at"),
    ],
)
def test_what_is_wanting_is_named_with_the_way_out(
    change: Change, name: str, status: str, words: str
) -> None:
    one = examined(change)[name]
    assert one.status == status
    assert words in f"{one.found} {one.hint}"


def test_only_what_was_changed_is_found_wanting() -> None:
    found = examined(gone(f"{CRD}/rayservices.ray.io"))
    assert {name for name, one in found.items() if one.status != "ok"} == {"crd rayservices"}


@pytest.mark.parametrize(
    ("arguments", "watched"),
    [
        ((), True),
        (("--watch-namespace=",), True),
        (("--watch-namespace", "a,expertmesh"), True),
        (("-watch-namespace=expertmesh",), True),
        (("--watch-namespace=expertmesh-dev",), False),
        (("--watch-namespace", "a,b"), False),
    ],
)
def test_which_namespaces_an_operator_watches(arguments: tuple[str, ...], watched: bool) -> None:
    assert checks.watches(operator("v1.7.0", *arguments), "expertmesh") is watched


def test_gates_are_read_from_arguments() -> None:
    container = {"command": ["/manager"], "args": ["--feature-gates=RayCronJob=true,Other=false", "--x"]}
    assert checks.gates(container) == {"RayCronJob": True, "Other": False}
    found = list(checks.check_operator([operator("v1.7.0", "--feature-gates=RayCronJob=true")], "expertmesh"))
    assert next(one for one in found if one.name == "gate RayCronJob").found.startswith("on")


def test_the_report_is_a_table_or_json() -> None:
    found = list(examined(gone(f"{CRD}/rayservices.ray.io")).values())
    told = as_json("https://cluster.test", ASKED, found)
    assert json.loads(json.dumps(told)) == told
    assert (told["well"], told["namespace"]) == (False, "expertmesh")
    assert {"name", "status", "found", "hint"} == set(told["findings"][0])
    console = Console(width=300, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(as_table(found))
    lines = [line for line in shown.get().splitlines() if "crd rayservices" in line]
    assert len(lines) == 1 and "fail" in lines[0] and "k8s/kuberay/README.md" in lines[0]
    # What is well has no way out.
    assert all("restricted" not in line or "label" not in line for line in shown.get().splitlines())
