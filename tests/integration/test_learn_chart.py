"""The chart expertmesh-learn: the round that it makes, who may make it, and whom its pods reach."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cluster.config import Config, load_config
from tests.charts.crd_schema import crd_problems, kuberay_schema
from tests.charts.helm import Helm, Object, Refused, of_kind, one
from tests.charts.kuberay_rules import kuberay_problems
from tests.charts.kubernetes_schemas import pod_templates, template_problems
from tests.charts.matrix import PLAIN, Row, rows
from tests.charts.pod_security import template_problems as security_problems
from tests.charts.selectors import Pod, matches, pods
from workloads import cli
from workloads.k8s_submit import Owner, ray_job

CHART = "expertmesh-learn"
ROWS = [row for row in rows() if row.chart == CHART]
PLAIN_ROWS = [row for row in ROWS if row.switch == PLAIN]
HELM = Helm(4)
FOLDERS = next(row for row in PLAIN_ROWS if row.file.stem == "folders-values")
# What a Job's controller sets, which the submitter reads.
JOB = {"batch.kubernetes.io/job-name": "mesh-1", "batch.kubernetes.io/controller-uid": "uid"}


@cache
def rendered(row: Row) -> list[Object]:
    return row.render(HELM)


def round_of(objects: Sequence[Object]) -> Object:
    """The RayJob that comes to be, by the CronJob's pod or by KubeRay."""
    for item in of_kind(objects, "ConfigMap"):
        if "rayjob.yaml" in item["data"]:
            name = f"{one(objects, 'CronJob')['metadata']['name']}-29876543"
            return ray_job(yaml.safe_load(item["data"]["rayjob.yaml"]), name, "models", Owner(name, "uid"))
    found = one(objects, "RayCronJob")
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": f"{found['metadata']['name']}-abcde", "namespace": "models"},
        "spec": found["spec"]["jobTemplate"],
    }


def config_of(objects: Sequence[Object], folder: Path) -> Config:
    """The configuration of head and trainers, as the program's own parser takes it."""
    data = next(item["data"] for item in of_kind(objects, "ConfigMap") if "expertmesh.yaml" in item["data"])
    file = folder / "expertmesh.yaml"
    file.write_text(data["expertmesh.yaml"])
    return load_config(file, {}, {}).config


def all_pods(objects: Sequence[Object]) -> list[Pod]:
    """Those of the release, the round's included."""
    return pods(objects)


def changed(values: Mapping[str, Any]) -> list[Object]:
    return HELM.template(CHART, [FOLDERS.file], values)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_round_is_a_rayjob_that_kuberay_takes(row: Row) -> None:
    job = round_of(rendered(row))
    schema = kuberay_schema(job)
    assert schema is not None
    assert crd_problems(job, schema) == []
    assert kuberay_problems(job) == []
    for path, template in pod_templates(job):
        assert template_problems(template, "1.34") == [], path
        assert list(security_problems(template)) == [], path
        assert template["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_its_configuration_is_one_that_the_program_takes(row: Row, tmp_path: Path) -> None:
    objects = rendered(row)
    config = config_of(objects, tmp_path)
    groups = round_of(objects)["spec"]["rayClusterSpec"].get("workerGroupSpecs", [])
    training = config.learning.training
    assert config.ray.address == "auto"
    assert training.workers == sum(group["replicas"] for group in groups)
    for group in groups:
        # By these labels Ray Train finds the nodes.
        assert training.labels.items() <= group["labels"].items()
    assert config.learning.known


@pytest.mark.parametrize("row", PLAIN_ROWS, ids=str)
def test_places_are_on_volumes_that_every_pod_of_the_round_has(row: Row, tmp_path: Path) -> None:
    objects = rendered(row)
    config = config_of(objects, tmp_path)
    places = (config.model.path, config.versions.store, config.learning.stream, config.learning.state)
    for pod in pods([round_of(objects)]):
        if pod.labels["expertmesh.io/role"] == "job":
            continue
        (box,) = pod.template["spec"]["containers"]
        mounted = {mount["mountPath"] for mount in box["volumeMounts"]}
        for place in places:
            assert "://" in place or any(place == at or place.startswith(f"{at}/") for at in mounted), place
        assert {"/tmp", "/cache", "/dev/shm", "/etc/expertmesh"} <= mounted
        known = {volume["name"] for volume in pod.template["spec"]["volumes"]}
        assert {mount["name"] for mount in box["volumeMounts"]} == known
        environment = {entry["name"]: entry.get("value") for entry in box["env"]}
        assert environment["EXPERTMESH_CONFIG"] == "/etc/expertmesh/expertmesh.yaml"
        assert environment["HOME"] == environment["XDG_CACHE_HOME"] == "/cache"


def parsed(words: Sequence[str]) -> None:
    """SystemExit or a usage error if the program does not know the command or an option."""
    command: Any = typer.main.get_command(cli.app)
    assert words[0] == "expertmesh"
    rest = list(words[1:])
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context("expertmesh", rest)


def test_commands_are_the_programs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed(shlex.split(round_of(rendered(FOLDERS))["spec"]["entrypoint"]))
    (box,) = one(rendered(FOLDERS), "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"][
        "containers"
    ]
    names = {entry["name"] for entry in box["env"] if "valueFrom" in entry}
    assert names == {"JOB_NAME", "JOB_UID"}
    for name in names:
        monkeypatch.setenv(name, "x")
    parsed([*box["command"], *box["args"]])


def test_the_rayjob_is_called_after_the_job_and_belongs_to_it() -> None:
    pod = one(rendered(FOLDERS), "CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    (box,) = pod["spec"]["containers"]
    paths = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in box["env"]
        if "valueFrom" in entry
    }
    label = {name: path.removeprefix("metadata.labels['").removesuffix("']") for name, path in paths.items()}
    assert set(label.values()) == set(JOB)
    mount = next(m for m in box["volumeMounts"] if m["mountPath"] == "/etc/expertmesh-learn")
    volume = next(v for v in pod["spec"]["volumes"] if v["name"] == mount["name"])
    data = one(rendered(FOLDERS), "ConfigMap", volume["configMap"]["name"])["data"]
    assert Path(box["command"][-1]).name in data


def test_the_longest_name_is_short_enough_for_a_cronjobs_rayjob() -> None:
    objects = HELM.template(CHART, [FOLDERS.file], release="m" * 50)
    assert len(one(objects, "CronJob")["metadata"]["name"]) == 36
    assert kuberay_problems(round_of(objects)) == []


def test_the_submitter_may_do_what_it_does_and_no_more() -> None:
    objects = rendered(FOLDERS)
    role, binding = one(objects, "Role"), one(objects, "RoleBinding")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    spec = one(objects, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = one(objects, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False and spec["automountServiceAccountToken"] is True
    assert spec["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    # With KubeRay's own schedule nobody here needs any right.
    for row in ROWS:
        if of_kind(rendered(row), "RayCronJob"):
            assert not {item["kind"] for item in rendered(row)} & {
                "Role",
                "RoleBinding",
                "ServiceAccount",
                "CronJob",
            }


def reached(objects: Sequence[Object], pod: Pod, direction: str) -> list[Any]:
    """All rules of one direction that are for a pod."""
    return [
        rule
        for policy in of_kind(objects, "NetworkPolicy")
        if matches(policy["spec"]["podSelector"], pod.labels)
        for rule in policy["spec"].get(direction) or ()
    ]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_pod_is_denied_all_but_what_is_meant(row: Row) -> None:
    objects = rendered(row)
    if row.switch == "open-network" or row.file.stem == "raycronjob-values":
        assert of_kind(objects, "NetworkPolicy") == []
        return
    found = {pod.labels["expertmesh.io/role"]: pod for pod in all_pods(objects)}
    for role, pod in found.items():
        for kind in ("Ingress", "Egress"):
            assert any(
                kind in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod.labels)
                for policy in of_kind(objects, "NetworkPolicy")
            ), f"{role} is open to {kind}"
        # Names are resolved by all.
        ports = [port["port"] for rule in reached(objects, pod, "egress") for port in rule.get("ports", ())]
        assert ports.count(53) == 2
    kuberay = [rule for rule in reached(objects, found["head"], "ingress") if rule.get("ports")]
    assert [port["port"] for rule in kuberay for port in rule["ports"]] == [8265]
    inside = found.keys() - {"submitter"}
    for role in inside:
        others = {
            other
            for rule in reached(objects, found[role], "egress")
            for peer in rule.get("to", ())
            if "podSelector" in peer and "namespaceSelector" not in peer
            for other in found
            if matches(peer["podSelector"], found[other].labels)
        }
        assert others == inside
    if "submitter" in found:
        assert reached(objects, found["submitter"], "ingress") == []
        blocks = [
            p
            for r in reached(objects, found["submitter"], "egress")
            for p in r.get("to", ())
            if "ipBlock" in p
        ]
        assert len(blocks) == 1
        assert not any(
            "ipBlock" in peer
            for role in inside
            for rule in reached(objects, found[role], "egress")
            for peer in rule.get("to", ())
        )


def test_a_pod_that_ray_starts_is_not_another_releases() -> None:
    objects = rendered(FOLDERS)
    serving = {
        "app.kubernetes.io/instance": "serve",
        "app.kubernetes.io/part-of": "expertmesh",
        "expertmesh.io/role": "head",
    }
    assert not any(
        matches(policy["spec"]["podSelector"], serving) for policy in of_kind(objects, "NetworkPolicy")
    )
    # KubeRay gives Ray's pods this one label its own value.
    for policy in of_kind(objects, "NetworkPolicy"):
        assert "app.kubernetes.io/name" not in policy["spec"]["podSelector"].get("matchLabels", {})


def test_the_state_is_kept_when_the_chart_goes() -> None:
    claim = one(rendered(FOLDERS), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert (claim["spec"]["storageClassName"], claim["spec"]["resources"]["requests"]["storage"]) == (
        "shared",
        "50Gi",
    )
    assert of_kind(changed({"state": {"existingClaim": "mine"}}), "PersistentVolumeClaim") == []
    assert of_kind(changed({"state": {"url": "/versions/state"}}), "PersistentVolumeClaim") == []


def test_threads_are_the_cores_that_a_pod_may_take(tmp_path: Path) -> None:
    for cpu, threads in (("3500m", 4), ("8", 8), (2, 2)):
        limits = {"limits": {"cpu": cpu, "memory": "8Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}
        objects = changed({"trainers": {"resources": limits}})
        assert config_of(objects, tmp_path).learning.training.threads == threads


WRONG: list[tuple[Mapping[str, Any], str]] = [
    ({"scheduel": "x"}, "scheduel"),
    ({"schedule": "daily"}, "schedule"),
    ({"schedule": "TZ=UTC 1 2 3 4"}, "schedule has a TZ"),
    ({"scheduler": "Job"}, "scheduler"),
    ({"image": {"tag": "latest"}}, "tag"),
    ({"image": {"digest": "sha256:1"}}, "digest"),
    ({"model": {"existingClaim": ""}}, "model.existingClaim"),
    ({"model": {"path": "/data/model"}}, "model.path"),
    ({"versions": {"store": "/other"}}, "versions.store"),
    ({"versions": {"existingClaim": ""}}, "versions.existingClaim"),
    ({"versions": {"store": "s3://a/b"}}, "versions.existingClaim"),
    ({"stream": {"url": "/streams/x"}}, "stream.url"),
    ({"stream": {"url": "s3://a/b"}}, "stream.existingClaim"),
    ({"state": {"accessMode": "Any"}}, "accessMode"),
    ({"trainers": {"replicas": -1}}, "replicas"),
    ({"trainers": {"replicas": 1.5}}, "replicas"),
    ({"trainers": {"resources": {"limits": {"memory": "1Gi", "cpu": None}}}}, "cpu"),
    ({"head": {"tolerations": [{"kee": "x"}]}}, "kee"),
    ({"learning": {"training": {"stepz": 1}}}, "stepz"),
    ({"learning": {"training": {"workers": 3}}}, "learning.training.workers"),
    ({"learning": {"more": {"known": ["a"]}}}, "learning.more.known"),
    ({"learning": {"gate": {"levl": 1}}}, "levl"),
    ({"job": {"submissionMode": "SidecarMode"}}, "submissionMode"),
    ({"job": {"activeDeadlineSeconds": 0}}, "activeDeadlineSeconds"),
    ({"fullnameOverride": "1st"}, "fullnameOverride"),
    ({"networkPolicy": {"apiServer": {"cidr": "all"}}}, "cidr"),
    ({"extraEnv": [{"nam": "x"}]}, "nam"),
]


# helm 3 reads schemas with another library; what templates refuse is the same.
@pytest.mark.parametrize(
    ("major", "values", "words"),
    [*((4, *case) for case in WRONG), *((3, *case) for case in WRONG if "." not in case[1])],
    ids=lambda value: str(value) if isinstance(value, int | str) else "",
)
def test_wrong_values_are_refused_by_name(major: int, values: Mapping[str, Any], words: str) -> None:
    base = {"scheduler": "RayCronJob"} if "TZ" in words else {}
    with pytest.raises(Refused) as refused:
        Helm(major).template(CHART, [FOLDERS.file], {**base, **values})
    assert words in str(refused.value)
