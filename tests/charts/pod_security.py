"""What every pod template of the charts must be: the strictest of Kubernetes' pod security standards, and more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tests.charts.helm import Object
from tests.charts.kubernetes_schemas import pod_templates

# Volumes of the pod security standard "restricted".
_VOLUMES: Final = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)


def security_problems(objects: Sequence[Object]) -> list[str]:
    """Everything that is wrong with pods of a rendering."""
    found = []
    for item in objects:
        for path, template in pod_templates(item):
            found += [f"{path}: {problem}" for problem in template_problems(template)]
            if mounts_token(template) and not uses_token(item, path, template, objects):
                found.append(f"{path}: has a service-account token, and nothing there uses it")
        found += [f"{item['kind']}: autoscaler: {problem}" for problem in _autoscaler_problems(item)]
    return found


def template_problems(template: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one pod template."""
    spec = template["spec"]
    pod = spec.get("securityContext") or {}
    if pod.get("runAsNonRoot") is not True:
        yield "securityContext.runAsNonRoot is not true"
    if pod.get("runAsUser") == 0 or pod.get("runAsGroup") == 0:
        yield "runs as root"
    if (pod.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "securityContext.seccompProfile is not RuntimeDefault"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is set"
    for volume in spec.get("volumes") or ():
        kinds = set(volume) - {"name"}
        if not kinds <= _VOLUMES:
            yield f"volume {volume['name']} is a {', '.join(kinds)}"
    for container in [*(spec.get("initContainers") or ()), *spec["containers"]]:
        for problem in container_problems(container):
            yield f"container {container['name']}: {problem}"


def container_problems(container: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one container."""
    yield from _context_problems(container)
    image = container.get("image", "")
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest"):
        yield f"image {image!r} is of no certain version"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield "has a hostPort"


def _context_problems(container: Mapping[str, Any]) -> Iterator[str]:
    context = container.get("securityContext") or {}
    for key, wanted in (("allowPrivilegeEscalation", False), ("readOnlyRootFilesystem", True)):
        if context.get(key) is not wanted:
            yield f"securityContext.{key} is not {str(wanted).lower()}"
    if context.get("privileged"):
        yield "is privileged"
    if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
        yield "runs as root"
    capabilities = context.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "keeps capabilities"
    limits = (container.get("resources") or {}).get("limits") or {}
    for resource in ("cpu", "memory"):
        if not limits.get(resource):
            yield f"has no limit of {resource}"


def mounts_token(template: Mapping[str, Any]) -> bool:
    """Whether pods get a service account's token."""
    spec = template["spec"]
    if spec.get("automountServiceAccountToken") is not False:
        return True
    sources = [
        source
        for volume in spec.get("volumes") or ()
        for source in (volume.get("projected") or {}).get("sources") or ()
    ]
    return any("serviceAccountToken" in source for source in sources)


def uses_token(item: Object, path: str, template: Mapping[str, Any], objects: Sequence[Object]) -> bool:
    """Whether the pod's service account may do something, or Ray's autoscaler runs in the pod."""
    account = template["spec"].get("serviceAccountName")
    subjects = [
        subject
        for binding in objects
        if binding["kind"] in ("RoleBinding", "ClusterRoleBinding")
        for subject in binding.get("subjects") or ()
    ]
    if any(subject["kind"] == "ServiceAccount" and subject["name"] == account for subject in subjects):
        return True
    return path.endswith("headGroupSpec.template") and any(
        cluster.get("enableInTreeAutoscaling") for cluster in _clusters(item)
    )


def _autoscaler_problems(item: Object) -> Iterator[str]:
    for cluster in _clusters(item):
        if cluster.get("enableInTreeAutoscaling"):
            yield from _context_problems(cluster.get("autoscalerOptions") or {})


def _clusters(value: Any) -> Iterator[Mapping[str, Any]]:
    """RayCluster specs, at any depth."""
    if isinstance(value, dict):
        if "headGroupSpec" in value:
            yield value
        else:
            for below in value.values():
                yield from _clusters(below)
