"""The rules that charts are held against, each seen to bite: a rule that lets all through would say nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.cel_rules import broken_rules, compiled, rules_of
from tests.charts.crd_schema import crd_problems, crds, kuberay_schema, with_defaults
from tests.charts.helm import load_objects
from tests.charts.kuberay_rules import kuberay_problems
from tests.charts.kubernetes_schemas import VERSIONS, schema_problems, template_problems

Change = Callable[[dict[str, Any]], Any]


def _cluster() -> dict[str, Any]:
    def template(name: str) -> dict[str, Any]:
        return {"spec": {"containers": [{"name": name, "image": "ray:2.60.0"}]}}

    return {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": template("ray-head")},
        "workerGroupSpecs": [
            {
                "groupName": "cpu",
                "replicas": 1,
                "minReplicas": 1,
                "maxReplicas": 1,
                "rayStartParams": {},
                "labels": {"expertmesh.io/group": "cpu"},
                "template": template("ray-worker"),
            }
        ],
    }


def _service(name: str = "mesh") -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {"rayClusterConfig": _cluster()},
    }


def _job(name: str = "learn") -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {"entrypoint": "true", "shutdownAfterJobFinishes": True, "rayClusterSpec": _cluster()},
    }


def _ray_cluster(name: str = "mesh-abcde") -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": name}, "spec": _cluster()}


def _spec(item: dict[str, Any]) -> dict[str, Any]:
    return item["spec"]["rayClusterConfig"]


def _head(item: dict[str, Any]) -> dict[str, Any]:
    return _spec(item)["headGroupSpec"]


def _worker(item: dict[str, Any]) -> dict[str, Any]:
    return _spec(item)["workerGroupSpecs"][0]


def _set(within: Callable[[dict[str, Any]], dict[str, Any]], **changes: Any) -> Change:
    def change(item: dict[str, Any]) -> None:
        for key, value in changes.items():
            within(item)[key.replace("__", "-")] = value

    return change


def _all(*changes: Change) -> Change:
    def change(item: dict[str, Any]) -> None:
        for one in changes:
            one(item)

    return change


def _pod(group: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda item: group(item)["template"]["spec"]


def _start(group: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda item: group(item)["rayStartParams"]


def _head_env(name: str, value: str = "1") -> Change:
    return lambda item: (
        _head(item)["template"]["spec"]["containers"][0]
        .setdefault("env", [])
        .append({"name": name, "value": value})
    )


_V2 = _set(_spec, enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"})
_KUBERAY: dict[str, tuple[Change, str]] = {
    "restart policy of the head with autoscaler v2": (
        _all(_V2, _set(_pod(_head), restartPolicy="Always")),
        "head: restartPolicy",
    ),
    "restart policy of workers with autoscaler v2": (
        _all(_V2, _set(_pod(_worker), restartPolicy="OnFailure")),
        "cpu: restartPolicy",
    ),
    "autoscaler v2 by variable": (
        _all(
            _set(_spec, enableInTreeAutoscaling=True),
            _head_env("RAY_enable_autoscaler_v2"),
            _set(_pod(_worker), restartPolicy="Always"),
        ),
        "cpu: restartPolicy",
    ),
    "autoscaler v2 said twice": (
        _all(_V2, _head_env("RAY_enable_autoscaler_v2")),
        "RAY_enable_autoscaler_v2",
    ),
    "autoscaler v2 without an autoscaler": (
        _head_env("RAY_enable_autoscaler_v2"),
        "RAY_enable_autoscaler_v2",
    ),
    "an idle time without autoscaler v2": (_set(_worker, idleTimeoutSeconds=60), "cpu: idleTimeoutSeconds"),
    "a suspended group beside the autoscaler": (_all(_V2, _set(_worker, suspend=True)), "cpu: suspend"),
    "tokens without a version": (lambda item: _spec(item).pop("rayVersion"), "rayVersion"),
    "tokens with an old version": (_set(_spec, rayVersion="2.51.1"), "rayVersion"),
    "tokens with no version at all": (_set(_spec, rayVersion="nightly"), "rayVersion"),
    "labels in the head's start": (_set(_start(_head), labels="a=b"), "head: rayStartParams.labels"),
    "labels in a worker's start": (_set(_start(_worker), labels="a=b"), "cpu: rayStartParams.labels"),
    "no label's value": (_set(_worker, labels={"zone": "in(a, b)"}), "cpu: zone"),
    "no label's key": (_set(_worker, labels={"-zone": "a"}), "cpu: -zone"),
    "resources twice": (_set(_head, resources={"CPU": "1"}), "head: resources"),
    "no container": (_set(_pod(_worker), containers=[]), "cpu: no container"),
    "bounds the wrong way round": (_set(_worker, minReplicas=3, maxReplicas=2), "cpu: minReplicas"),
    "no bounds": (lambda item: _worker(item).pop("maxReplicas"), "cpu: minReplicas and maxReplicas"),
    "Redis by variable": (_head_env("RAY_REDIS_ADDRESS", "redis:6379"), "RAY_REDIS_ADDRESS"),
    "a password by variable": (
        _all(_set(_spec, gcsFaultToleranceOptions={"redisAddress": "r:1"}), _head_env("REDIS_PASSWORD")),
        "REDIS_PASSWORD",
    ),
    "rocksdb with Redis": (
        _set(_spec, gcsFaultToleranceOptions={"backend": "rocksdb", "redisAddress": "r:1"}),
        "redisAddress",
    ),
    "Redis with a volume": (
        _set(_spec, gcsFaultToleranceOptions={"redisAddress": "r:1", "storage": {"size": "1Gi"}}),
        "storage",
    ),
    "a claim and a size": (
        _set(
            _spec,
            gcsFaultToleranceOptions={"backend": "rocksdb", "storage": {"claimName": "a", "size": "1Gi"}},
        ),
        "claimName",
    ),
    "a name of the head's Service": (_set(_head, headService={"metadata": {"name": "a"}}), "headService"),
    "an upgrade in steps without the autoscaler": (
        lambda item: item["spec"].update(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}),
        "enableInTreeAutoscaling",
    ),
    "Kubernetes' own tokens": (
        _set(_spec, authOptions={"mode": "token", "enableK8sTokenAuth": True}),
        "enableK8s",
    ),
}


@pytest.mark.parametrize("case", _KUBERAY)
def test_kuberays_own_rules(case: str) -> None:
    change, told = _KUBERAY[case]
    item = _service()
    assert kuberay_problems(item) == []
    change(item)
    assert any(told in problem for problem in kuberay_problems(item)), kuberay_problems(item)
    # Inside a job it is the same cluster.
    job = {**_job(), "spec": {**_job()["spec"], "rayClusterSpec": _spec(item)}}
    if not any(key in case for key in ("Service", "upgrade")):
        assert any(told in problem for problem in kuberay_problems(job))


@pytest.mark.parametrize(("made", "most"), [(_ray_cluster, 53), (_service, 47), (_job, 47)])
def test_lengths_of_names(made: Callable[[str], dict[str, Any]], most: int) -> None:
    assert kuberay_problems(made("n" * most)) == []
    assert "metadata.name" in kuberay_problems(made("n" * (most + 1)))[0]
    assert "metadata.name" in kuberay_problems(made("1st"))[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ttlSecondsAfterFinished": 60, "shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished"),
        ({"backoffLimit": -1}, "backoffLimit"),
        ({"activeDeadlineSeconds": 0}, "activeDeadlineSeconds"),
        ({"rayClusterSpec": None}, "rayClusterSpec"),
        ({"submissionMode": "SidecarMode", "submitterPodTemplate": {"spec": {}}}, "submitterPodTemplate"),
        ({"submissionMode": "InteractiveMode", "backoffLimit": 1}, "backoffLimit"),
        ({"suspend": True, "shutdownAfterJobFinishes": False}, "suspend"),
    ],
)
def test_kuberays_rules_of_jobs(changes: dict[str, Any], told: str) -> None:
    job = _job()
    assert kuberay_problems(job) == []
    job["spec"].update(changes)
    assert any(told in problem for problem in kuberay_problems(job))
    cron = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": {"name": "learn"},
        "spec": {"schedule": "0 3 * * *", "jobTemplate": job["spec"]},
    }
    assert any(told in problem for problem in kuberay_problems(cron))


def test_kuberays_rules_of_schedules() -> None:
    cron = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": {"name": "learn"},
        "spec": {"schedule": "0 3 * * *", "timeZone": "Etc/UTC", "jobTemplate": _job()["spec"]},
    }
    assert kuberay_problems(cron) == []
    cron["spec"].update(schedule="TZ=Etc/UTC 0 3 * * *", timeZone="")
    assert len(kuberay_problems(cron)) == 2


_SCHEMA: dict[str, tuple[Change, str]] = {
    "an unknown field": (_set(_spec, workerGroups=[]), "workerGroups: unknown field"),
    "an unknown field of a pod": (_set(_pod(_head), container=[]), "container: unknown field"),
    "a number for a text": (_set(_start(_head), num__cpus=0), "num-cpus: 0 is no string"),
    "a text for a number": (_set(_worker, replicas="1"), "replicas: '1' is no integer"),
    "a boolean for a number": (_set(_worker, replicas=True), "replicas: True is no integer"),
    "a number too large": (_set(_worker, maxReplicas=2**31), "int32"),
    "none of the choices": (_set(_spec, authOptions={"mode": "password"}), "mode: 'password' is none of"),
    "a missing field": (lambda item: _worker(item).pop("template"), "template: missing"),
    "a negative number": (lambda item: item["spec"].update(rayClusterDeletionDelaySeconds=-1), "below 0"),
    "no quantity": (
        lambda item: _head(item)["template"]["spec"]["containers"][0].update(
            resources={"limits": {"cpu": "two"}}
        ),
        "does not match",
    ),
    "a port twice": (
        lambda item: _head(item)["template"]["spec"]["containers"][0].update(
            ports=[{"containerPort": 1, "protocol": "TCP"}, {"containerPort": 1, "protocol": "TCP"}]
        ),
        "is there twice",
    ),
    "what CEL refuses": (_set(_spec, managedBy="me"), "managedBy field value must be"),
}


@pytest.mark.parametrize("case", _SCHEMA)
def test_the_crds_schema(case: str) -> None:
    change, told = _SCHEMA[case]
    item = _service()
    schema = kuberay_schema(item)
    assert schema is not None
    assert crd_problems(item, schema) == []
    change(item)
    assert any(told in problem for problem in crd_problems(item, schema)), crd_problems(item, schema)


def test_nulls_are_dropped_and_defaults_applied() -> None:
    """As the API server does before it validates: without that, valid objects would be refused."""
    item = _service()
    _worker(item).update(numOfHosts=None, minReplicas=None)
    schema = kuberay_schema(item)
    assert schema is not None
    ready = with_defaults(item, schema)
    worker = _worker(ready)
    assert (worker["numOfHosts"], worker["minReplicas"], worker["priority"]) == (1, 0, 0)
    assert crd_problems(item, schema) == []
    assert _worker(item)["numOfHosts"] is None, "what was given is left as it is"


def test_what_may_not_change_is_held_against_what_was_there() -> None:
    before = _service()
    _spec(before)["gcsFaultToleranceOptions"] = {"backend": "redis", "redisAddress": "r:1"}
    after = copy.deepcopy(before)
    schema = kuberay_schema(after)
    assert schema is not None
    assert crd_problems(after, schema, before) == []
    _spec(after)["gcsFaultToleranceOptions"] = {"backend": "rocksdb"}
    assert crd_problems(after, schema) == [], "alone it is valid"
    assert "immutable" in crd_problems(after, schema, before)[0]


def test_all_cel_rules_compile_and_bite() -> None:
    rules = {rule for schema in crds().values() for rule in rules_of(schema)}
    assert len(rules) >= 6
    for rule in rules:
        compiled(rule)
    deletion = [{"rule": rule} for rule in rules if "has(self.onSuccess)" in rule]
    policy = {"policy": "DeleteCluster"}
    assert list(broken_rules(deletion, {"onSuccess": policy, "onFailure": policy})) == []
    assert list(broken_rules(deletion, {"onSuccess": policy}))
    assert list(broken_rules(deletion, {"onSuccess": policy, "onFailure": policy, "deletionRules": []}))


def test_a_key_that_is_there_twice_is_no_yaml() -> None:
    with pytest.raises(Exception, match="twice"):
        load_objects("kind: Pod\nkind: Pod\n")


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_schemas(version: str) -> None:
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "a"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"a": "b"}}},
    }
    assert schema_problems(budget, version) == []
    assert schema_problems({**budget, "spec": {"minimum": 1}}, version)
    assert schema_problems({**budget, "apiVersion": "policy/v1beta1"}, version) is None
    template = {"spec": {"containers": [{"name": "a", "image": "b:1"}]}}
    assert template_problems(template, version) == []
    assert template_problems({"spec": {"containers": [{"name": "a", "limit": {}}]}}, version)


def test_a_field_is_refused_where_it_was_not_there_yet() -> None:
    """Three versions are three schemas: volumes of images came after 1.29."""
    template = {
        "spec": {
            "containers": [{"name": "a", "image": "b:1"}],
            "volumes": [{"name": "v", "image": {"reference": "c:1"}}],
        }
    }
    assert template_problems(template, "1.29")
    assert template_problems(template, "1.34") == []
