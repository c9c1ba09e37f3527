"""What KubeRay's own validator refuses though the CRD's schema admits it, as far as it concerns what charts can say.

Facts from KubeRay 1.7: ray-operator/controllers/ray/utils/validation.go and constant.go. Messages here are our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.charts.helm import Object

# A RayCluster's Services are called after it, the longest suffix being "-serve-svc", in 63 characters. RayService and
# RayJob append six to name their cluster, and a RayCronJob more to name its job.
NAME_LENGTHS: Final[Mapping[str, int]] = {"RayCluster": 53, "RayService": 47, "RayJob": 47}
_DNS_1035: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_LABEL_KEY: Final = re.compile(
    r"(?:[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_START_RESOURCES: Final = ("num-cpus", "num-gpus", "memory", "resources")
_AUTH_FROM: Final = (2, 52, 0)
_ROCKSDB_FROM: Final = (2, 57, 0)


def kuberay_problems(item: Object) -> list[str]:
    """Everything that is refused of a RayCluster, RayService, RayJob or RayCronJob; [] for other kinds."""
    return list(_problems(item)) if item["apiVersion"].startswith("ray.io/") else []


def _problems(item: Object) -> Iterator[str]:
    kind, spec = item["kind"], item.get("spec") or {}
    yield from _name_problems(kind, item["metadata"].get("name", ""))
    annotations = item["metadata"].get("annotations") or {}
    if kind == "RayCluster":
        yield from cluster_problems(spec, annotations)
    elif kind == "RayService":
        yield from _service_problems(spec, annotations)
    elif kind == "RayJob":
        yield from _job_problems(spec, annotations)
    elif kind == "RayCronJob":
        if "TZ" in spec.get("schedule", ""):
            yield "schedule: a time zone belongs into timeZone"
        if spec.get("timeZone") == "":
            yield "timeZone: empty"
        yield from _job_problems(spec.get("jobTemplate") or {}, annotations)


def _name_problems(kind: str, name: str) -> Iterator[str]:
    if len(name) > NAME_LENGTHS.get(kind, 253):
        yield f"metadata.name: {len(name)} characters, a {kind} may have {NAME_LENGTHS[kind]}"
    if kind in NAME_LENGTHS and not _DNS_1035.fullmatch(name):
        yield f"metadata.name: {name!r} does not begin with a letter, or has other characters than a-z, 0-9 and -"


def _service_problems(spec: Mapping[str, Any], annotations: Mapping[str, str]) -> Iterator[str]:
    cluster = spec.get("rayClusterConfig") or {}
    if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: not for a RayService"
    if cluster.get("upgradeStrategy"):
        yield "rayClusterConfig.upgradeStrategy: not for a cluster that a RayService makes"
    yield from cluster_problems(cluster, annotations)
    head_service = (cluster.get("headGroupSpec") or {}).get("headService") or {}
    if (head_service.get("metadata") or {}).get("name"):
        yield "headService.metadata.name: must not be set"
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type") not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy.type: {strategy['type']!r} is unknown"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        if not cluster.get("enableInTreeAutoscaling"):
            yield "upgradeStrategy.type: NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling"
        if not strategy.get("clusterUpgradeOptions"):
            yield "upgradeStrategy.clusterUpgradeOptions: missing"
    if (spec.get("rayClusterDeletionDelaySeconds") or 0) < 0:
        yield "rayClusterDeletionDelaySeconds: negative"


def _job_problems(spec: Mapping[str, Any], annotations: Mapping[str, str]) -> Iterator[str]:
    shutdown, selector = spec.get("shutdownAfterJobFinishes"), spec.get("clusterSelector")
    if spec.get("suspend") and not shutdown:
        yield "suspend: needs shutdownAfterJobFinishes"
    if not shutdown and (spec.get("ttlSecondsAfterFinished") or 0) > 0:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if (spec.get("ttlSecondsAfterFinished") or 0) < 0:
        yield "ttlSecondsAfterFinished: negative"
    if not spec.get("rayClusterSpec") and not selector:
        yield "rayClusterSpec: one of rayClusterSpec and clusterSelector must be set"
    if (spec.get("backoffLimit") or 0) < 0:
        yield "backoffLimit: negative"
    if selector and (spec.get("backoffLimit") or 0) > 0:
        yield "backoffLimit: not with clusterSelector"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key) is not None and spec[key] <= 0:
            yield f"{key}: not positive"
    if spec.get("submissionMode") == "InteractiveMode" and (spec.get("backoffLimit") or 0) > 0:
        yield "backoffLimit: not with InteractiveMode"
    cluster = spec.get("rayClusterSpec") or {}
    if spec.get("submissionMode") == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(key):
                yield f"{key}: not with SidecarMode"
        if _restart_policy(cluster.get("headGroupSpec") or {}) not in ("", "Never"):
            yield "headGroupSpec.template.spec.restartPolicy: must be Never or unset with SidecarMode"
    if cluster:
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield "authOptions.enableK8sTokenAuth: not for a RayJob"
        yield from cluster_problems(cluster, annotations)


def cluster_problems(spec: Mapping[str, Any], annotations: Mapping[str, str]) -> Iterator[str]:
    """Everything that is refused of a RayCluster's spec, in whatever it is embedded."""
    head, workers = spec.get("headGroupSpec") or {}, spec.get("workerGroupSpecs") or []
    for name, group in [("head", head), *((worker.get("groupName", "?"), worker) for worker in workers)]:
        yield from _group_problems(name, group)
    yield from _autoscaler_problems(spec, head, workers)
    yield from _fault_tolerance_problems(spec, head, annotations)
    yield from _auth_problems(spec)


def _group_problems(name: str, group: Mapping[str, Any]) -> Iterator[str]:
    start, labels = group.get("rayStartParams") or {}, group.get("labels") or {}
    if not _containers(group):
        yield f"{name}: no container"
    if group.get("resources") and any(start.get(key) for key in _START_RESOURCES):
        yield f"{name}: resources and rayStartParams both say what the node has"
    if "labels" in start:
        yield f"{name}: rayStartParams.labels is not supported, labels is the field for them"
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value) or len(value) > 63:
            yield f"{name}: {key}: {value} is no label"
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if (least or 0) < 0 or (most or 0) < 0:
        yield f"{name}: minReplicas or maxReplicas is negative"
    if least is not None and most is not None and least > most:
        yield f"{name}: minReplicas {least} is above maxReplicas {most}"


def _autoscaler_problems(
    spec: Mapping[str, Any], head: Mapping[str, Any], workers: list[Any]
) -> Iterator[str]:
    on = bool(spec.get("enableInTreeAutoscaling"))
    options = spec.get("autoscalerOptions") or {}
    variable = _environment(head).get("RAY_enable_autoscaler_v2")
    second = on and (options.get("version") == "v2" or variable in ("1", "true"))
    if not on and variable in ("1", "true"):
        yield "RAY_enable_autoscaler_v2: set without enableInTreeAutoscaling"
    if on and options.get("version") and variable is not None:
        yield "RAY_enable_autoscaler_v2: set beside autoscalerOptions.version"
    if (options.get("idleTimeoutSeconds") or 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds: negative"
    if any(item["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for item in options.get("env") or ()):
        yield "autoscalerOptions.env: KUBERAY_GEN_AUTOSCALER_START_CMD is KubeRay's own"
    groups = [("head", head), *((worker["groupName"], worker) for worker in workers)]
    for name, group in groups:
        if second and _restart_policy(group) not in ("", "Never"):
            yield f"{name}: restartPolicy must be Never or unset with autoscaler v2"
        if on and group.get("suspend"):
            yield f"{name}: suspend does not go with the autoscaler"
        if group.get("idleTimeoutSeconds") is not None and not second:
            yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
        if (
            not on
            and name != "head"
            and (group.get("minReplicas") is None or group.get("maxReplicas") is None)
        ):
            yield f"{name}: minReplicas and maxReplicas must be set without the autoscaler"


def _fault_tolerance_problems(
    spec: Mapping[str, Any], head: Mapping[str, Any], annotations: Mapping[str, str]
) -> Iterator[str]:
    options, variables = spec.get("gcsFaultToleranceOptions"), _environment(head)
    start = head.get("rayStartParams") or {}
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS: set without gcsFaultToleranceOptions"
    else:
        if annotations.get("ray.io/ft-enabled") or annotations.get("ray.io/external-storage-namespace"):
            yield "gcsFaultToleranceOptions: not beside the annotations for the same"
        for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
            if name in variables:
                yield f"{name}: set beside gcsFaultToleranceOptions"
        if start.get("redis-password"):
            yield "rayStartParams.redis-password: set beside gcsFaultToleranceOptions"
        yield from _backend_problems(spec, options, variables, head)
    if start.get("redis-username") or "REDIS_USERNAME" in variables:
        yield "REDIS_USERNAME: belongs into gcsFaultToleranceOptions"


def _backend_problems(
    spec: Mapping[str, Any],
    options: Mapping[str, Any],
    variables: Mapping[str, str],
    head: Mapping[str, Any],
) -> Iterator[str]:
    storage = options.get("storage")
    if options.get("backend", "redis") == "redis":
        if storage is not None:
            yield "gcsFaultToleranceOptions.storage: for rocksdb alone"
        return
    for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(key):
            yield f"gcsFaultToleranceOptions.{key}: not with rocksdb"
    if (storage or {}).get("claimName") and any(
        storage.get(key) for key in ("size", "storageClassName", "accessModes")
    ):
        yield "gcsFaultToleranceOptions.storage.claimName: not beside size, storageClassName and accessModes"
    for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
        if name in variables:
            yield f"{name}: KubeRay sets it itself"
    if _version(spec.get("rayVersion", "")) < _ROCKSDB_FROM:
        yield "rayVersion: rocksdb needs Ray 2.57"
    mounts = [mount for container in _containers(head)[:1] for mount in container.get("volumeMounts") or ()]
    if any(mount["mountPath"] == "/data/gcs" for mount in mounts):
        yield "head: /data/gcs is mounted by KubeRay itself"


def _auth_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    options = spec.get("authOptions") or {}
    if options.get("mode") != "token":
        return
    if not spec.get("rayVersion"):
        yield "rayVersion: authOptions.mode is token, so it must be set"
    elif _version(spec["rayVersion"]) < _AUTH_FROM:
        yield f"rayVersion: {spec['rayVersion']} has no token authentication, from 2.52.0 on"


def _version(text: str) -> tuple[int, ...]:
    parts = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in parts.groups()) if parts else (0, 0, 0)


def _containers(group: Mapping[str, Any]) -> list[Any]:
    return ((group.get("template") or {}).get("spec") or {}).get("containers") or []


def _restart_policy(group: Mapping[str, Any]) -> str:
    return ((group.get("template") or {}).get("spec") or {}).get("restartPolicy") or ""


def _environment(group: Mapping[str, Any]) -> dict[str, str]:
    """Of the first container, which is Ray's."""
    variables = [item for container in _containers(group)[:1] for item in container.get("env") or ()]
    return {item["name"]: item.get("value", "") for item in variables}
