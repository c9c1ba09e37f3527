"""What becomes of the overlays: the renderings that are kept, and whether the parts around the charts fit them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.helm import CHARTS as CHARTS_FOLDER
from tests.charts.helm import ROOT, Object, load_objects, of_kind, one
from tests.charts.kubernetes_schemas import pod_templates, schema_problems
from tests.charts.tools import helm_binary, kubectl_binary
from workloads.k8s_doctor import INSTALLS
from workloads.k8s_render import CHARTS, Wanted, is_test, render

OVERLAYS = ("dev", "gpu", "mixed")
RENDERED = ROOT / "k8s" / "rendered"
THERE = [chart for chart in CHARTS if (CHARTS_FOLDER / f"expertmesh-{chart}" / "Chart.yaml").is_file()]
CASES = [(overlay, chart) for overlay in OVERLAYS for chart in THERE]
# Objects of the charts by where they are in the API.
PLURALS = {
    "ConfigMap": ("", "configmaps"),
    "CronJob": ("batch", "cronjobs"),
    "Deployment": ("apps", "deployments"),
    "HTTPRoute": ("gateway.networking.k8s.io", "httproutes"),
    "Ingress": ("networking.k8s.io", "ingresses"),
    "NetworkPolicy": ("networking.k8s.io", "networkpolicies"),
    "PersistentVolumeClaim": ("", "persistentvolumeclaims"),
    "PodDisruptionBudget": ("policy", "poddisruptionbudgets"),
    "PodMonitor": ("monitoring.coreos.com", "podmonitors"),
    "PrometheusRule": ("monitoring.coreos.com", "prometheusrules"),
    "RayCronJob": ("ray.io", "raycronjobs"),
    "RayService": ("ray.io", "rayservices"),
    "Role": ("rbac.authorization.k8s.io", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io", "rolebindings"),
    "Secret": ("", "secrets"),
    "Service": ("", "services"),
    "ServiceAccount": ("", "serviceaccounts"),
    "ServiceMonitor": ("monitoring.coreos.com", "servicemonitors"),
}

# Of expertmesh-operator with `watchNodes`: to read nodes, which an administrator of the cluster must grant.
ADMINISTRATORS = {"ClusterRole", "ClusterRoleBinding"}


@cache
def made(overlay: str, chart: str, major: int = 4, sets: tuple[str, ...] = ()) -> str:
    environment = {"HELM": str(helm_binary(major)), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return render(ROOT, Wanted(chart, overlay, sets=sets), environment)


@cache
def platform(overlay: str) -> str:
    ended = subprocess.run(
        [kubectl_binary(), "kustomize", ROOT / "k8s" / "overlays" / overlay],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def kept(overlay: str, name: str) -> str:
    return (RENDERED / overlay / f"{name}.yaml").read_text("utf-8")


@pytest.mark.parametrize(("overlay", "chart"), CASES)
def test_what_is_kept_is_what_the_charts_make(overlay: str, chart: str) -> None:
    assert made(overlay, chart) == kept(overlay, chart), "run `make render` and commit what it changes"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_kept_is_what_kustomize_makes(overlay: str) -> None:
    assert platform(overlay) == kept(overlay, "platform"), "run `make render` and commit what it changes"


@pytest.mark.parametrize("chart", THERE)
def test_helm_3_makes_the_same_objects(chart: str) -> None:
    assert load_objects(made("mixed", chart, 3)) == load_objects(made("mixed", chart))


def test_a_change_of_a_value_shows() -> None:
    assert made("dev", "learn", sets=("schedule=1 2 3 4 5",)) != kept("dev", "learn")
    assert len(list(RENDERED.glob("*/*.yaml"))) == len(OVERLAYS) * (len(THERE) + 1)


@pytest.mark.parametrize("version", ["1.29", "1.34", "1.37"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_around_the_charts_are_valid(overlay: str, version: str) -> None:
    objects = load_objects(platform(overlay))
    for item in objects:
        assert schema_problems(item, version) == [], item["metadata"]["name"]
    (namespace,) = of_kind(objects, "Namespace")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == "restricted"
    inside = [item for item in objects if item["metadata"].get("namespace")]
    assert {item["metadata"]["namespace"] for item in inside} == {namespace["metadata"]["name"]}


def cores(quantity: Any) -> float:
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def size(quantity: Any) -> float:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    text = str(quantity)
    return float(text[:-2]) * units[text[-2:]] if text[-2:] in units else float(text)


def demands(objects: Sequence[Object]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(How many, limits) of every container; Ray's groups as often as they may be."""
    for item in objects:
        if is_test(item):
            continue
        spec = item.get("spec") or {}
        cluster = spec.get("rayClusterConfig")
        if cluster:
            for box in cluster["headGroupSpec"]["template"]["spec"]["containers"]:
                yield 1, box["resources"]["limits"]
            for group in cluster["workerGroupSpecs"]:
                for box in group["template"]["spec"]["containers"]:
                    yield group["maxReplicas"], box["resources"]["limits"]
        else:
            for _, template in pod_templates(item):
                for box in template["spec"]["containers"]:
                    yield spec.get("replicas", 1), box["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_quota_has_room_for_an_upgrade(overlay: str) -> None:
    """While the next mesh comes up beside the one that serves, there are two, each as large as it may become."""
    hard = one(load_objects(platform(overlay)), "ResourceQuota")["spec"]["hard"]
    taken = {"cpu": 0.0, "memory": 0.0, "gpu": 0.0, "pods": 0.0}
    for chart in THERE:
        objects = load_objects(made(overlay, chart))
        if chart == "learn":
            data = next(i["data"] for i in of_kind(objects, "ConfigMap") if "rayjob.yaml" in i["data"])
            job = yaml.safe_load(data["rayjob.yaml"])["spec"]["rayClusterSpec"]
            job.setdefault("workerGroupSpecs", [])
            objects.append({"kind": "RayJob", "spec": {"rayClusterConfig": job}, "metadata": {}})
        for count, limits in demands(objects):
            times = count * (2 if chart == "serve" else 1)
            taken["cpu"] += times * cores(limits["cpu"])
            taken["memory"] += times * size(limits["memory"])
            taken["gpu"] += times * float(limits.get("nvidia.com/gpu", 0))
            taken["pods"] += times
    assert taken["cpu"] <= cores(hard["limits.cpu"])
    assert taken["memory"] <= size(hard["limits.memory"])
    assert taken["gpu"] <= float(hard["requests.nvidia.com/gpu"])
    assert taken["pods"] <= float(hard["pods"])
    # A quota that could never be met would be none.
    assert taken["cpu"] > cores(hard["limits.cpu"]) / 8


@pytest.mark.parametrize(("overlay", "chart"), CASES)
def test_priority_classes_are_those_of_the_base(overlay: str, chart: str) -> None:
    there = {item["metadata"]["name"] for item in of_kind(load_objects(platform(overlay)), "PriorityClass")}
    text = made(overlay, chart)
    named = {line.split(": ")[1] for line in text.splitlines() if "priorityClassName:" in line}
    assert named <= there


@pytest.mark.parametrize(("overlay", "chart"), CASES)
def test_who_installs_may_make_every_object(overlay: str, chart: str) -> None:
    rules = one(load_objects(platform(overlay)), "ClusterRole", "expertmesh-installer")["rules"]
    for item in load_objects(made(overlay, chart)):
        if is_test(item) or item["kind"] in ADMINISTRATORS:
            continue
        group, plural = PLURALS[item["kind"]]
        verbs = {
            verb
            for rule in rules
            if group in rule["apiGroups"] and plural in rule["resources"]
            for verb in rule["verbs"]
        }
        assert {"get", "create", "update", "patch", "delete"} <= verbs, plural


@pytest.mark.parametrize(("overlay", "chart"), CASES)
def test_who_installs_may_do_what_the_charts_roles_grant(overlay: str, chart: str) -> None:
    """Kubernetes lets nobody grant what they may not do themselves."""
    installer = one(load_objects(platform(overlay)), "ClusterRole", "expertmesh-installer")["rules"]

    def flat(rules: list[dict[str, list[str]]]) -> set[tuple[str, str, str]]:
        return {
            (group, plural, verb)
            for rule in rules
            for group in rule["apiGroups"]
            for plural in rule["resources"]
            for verb in rule["verbs"]
        }

    for role in of_kind(load_objects(made(overlay, chart)), "Role"):
        assert flat(role["rules"]) <= flat(installer), role["metadata"]["name"]


@pytest.mark.parametrize("chart", THERE)
def test_the_doctor_asks_for_what_installing_takes(chart: str) -> None:
    """Of objects that are there in every installation."""
    kinds = [
        {
            PLURALS[item["kind"]]
            for item in load_objects(made(overlay, chart))
            if not is_test(item) and item["kind"] not in ADMINISTRATORS
        }
        for overlay in OVERLAYS
    ]
    assert set.intersection(*kinds) <= set(INSTALLS[chart])


def test_the_namespace_refuses_what_no_chart_allows() -> None:
    policy = one(load_objects(platform("dev")), "NetworkPolicy")
    assert policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_kuberays_values_name_gates_that_the_doctor_knows() -> None:
    from workloads.k8s_checks import GATES

    values = yaml.safe_load((ROOT / "k8s" / "kuberay" / "values.yaml").read_text())
    named = {gate["name"] for gate in values["featureGates"]}
    assert set(GATES) <= named
    readme = Path(ROOT / "k8s" / "kuberay" / "README.md").read_text()
    assert all(f"| {name} |" in readme for name in named)
