"""What `expertmesh k8s doctor` makes of what a cluster says: pure functions, one finding or more each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cluster.kube_objects import quantity
from workloads.k8s_api import Document

Status = Literal["ok", "warn", "fail"]

OLDEST: Final = (1, 29)
NEWEST: Final = (1, 37)
"""Kubernetes releases whose schemas the charts were held against."""
KUBERAY: Final = (1, 7)
# A field that came with KubeRay 1.7: CRDs carry no version of their own.
_SINCE_1_7: Final = "tlsOptions"
CRDS: Final = ("rayclusters", "rayservices", "rayjobs", "raycronjobs")
GATES: Final = {
    "RayCronJob": (False, "expertmesh-learn with scheduler: RayCronJob"),
    "RayServiceIncrementalUpgrade": (True, "upgrades that shift requests step by step"),
    "GCSFaultToleranceEmbeddedStorage": (False, "a head that comes back without Redis"),
}
"""Feature gates of KubeRay 1.7 that something here can use: their default, and what for."""
_CRDS_HINT: Final = "install or upgrade KubeRay's CRDs: k8s/kuberay/README.md"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `hint` is the way out where it is not well."""

    name: str
    status: Status
    found: str
    hint: str = ""


def check_version(version: Document) -> Finding:
    """Of the API server."""
    said = str(version.get("gitVersion", "unknown"))
    number = release(said)
    if number is None:
        return Finding("kubernetes", "warn", said, "this is no version that is known; go on with care")
    if number < OLDEST:
        return Finding("kubernetes", "fail", said, f"the charts need {_dotted(OLDEST)} or later")
    if number > NEWEST:
        return Finding("kubernetes", "warn", said, f"the charts were held against up to {_dotted(NEWEST)}")
    return Finding("kubernetes", "ok", said)


def check_crds(found: Mapping[str, Document | None]) -> Iterator[Finding]:
    """KubeRay's CRDs by plural, of which the last is needed by an option only."""
    for plural in CRDS:
        crd, name = found.get(plural), f"crd {plural}"
        optional = plural == "raycronjobs"
        if crd is None:
            what = "only for expertmesh-learn with scheduler: RayCronJob; " if optional else ""
            yield Finding(name, "warn" if optional else "fail", "not installed", f"{what}{_CRDS_HINT}")
            continue
        served = [one for one in crd["spec"]["versions"] if one.get("served")]
        said = ", ".join(one["name"] for one in served)
        if "v1" not in {one["name"] for one in served}:
            yield Finding(name, "fail", f"serves {said or 'no version'}, not v1", _CRDS_HINT)
        elif not optional and not _has_field(served, _SINCE_1_7):
            yield Finding(name, "fail", f"{said}, of a KubeRay before 1.7", _CRDS_HINT)
        else:
            yield Finding(name, "ok", said if optional else f"{said}, of KubeRay 1.7 or later")


def _has_field(versions: Iterable[Document], field: str) -> bool:
    """Whether a schema has a property of this name anywhere."""
    waiting: list[object] = [one.get("schema", {}) for one in versions if one["name"] == "v1"]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            properties = node.get("properties")
            if isinstance(properties, dict) and field in properties:
                return True
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return False


def check_operator(deployments: Sequence[Document], namespace: str) -> Iterator[Finding]:
    """KubeRay's operator, as it was deployed, and the feature gates that it was given."""
    if not deployments:
        yield Finding("kuberay", "fail", "no operator runs in this cluster", "see k8s/kuberay/README.md")
        return
    deployment = next((one for one in deployments if watches(one, namespace)), deployments[0])
    where = f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    image = str(container.get("image", ""))
    number = release(image.rpartition(":")[2])
    ready = int((deployment.get("status") or {}).get("readyReplicas") or 0)
    if not watches(deployment, namespace):
        yield Finding(
            "kuberay",
            "fail",
            f"{where} does not watch the namespace {namespace}",
            "add it to the operator's watchNamespace",
        )
    elif not ready:
        yield Finding("kuberay", "fail", f"{where} is not ready", f"kubectl describe deployment of {where}")
    elif number is not None and number < KUBERAY:
        yield Finding("kuberay", "fail", f"{where} is {_dotted(number)}", "upgrade it to 1.7, its CRDs first")
    elif number is None:
        yield Finding("kuberay", "warn", f"{where}: {image}", "its version can't be told; it should be 1.7")
    else:
        yield Finding("kuberay", "ok", f"{where} {image.rpartition(':')[2]}")
    given = gates(container)
    for gate, (default, purpose) in GATES.items():
        on = given.get(gate, default)
        yield Finding(f"gate {gate}", "ok", f"{'on' if on else 'off'}; for {purpose}")


def gates(container: Document) -> dict[str, bool]:
    """Feature gates by name, of the operator's arguments."""
    found = {}
    for argument in (*container.get("command", ()), *container.get("args", ())):
        for value in re.findall(r"^--?feature-gates=(.*)$", str(argument)):
            for pair in value.split(","):
                name, _, on = pair.partition("=")
                found[name.strip()] = on.strip().lower() == "true"
    return found


def watches(deployment: Document, namespace: str) -> bool:
    """Whether the operator looks at this namespace: at all, where it is given none."""
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    arguments = [str(one) for one in (*container.get("command", ()), *container.get("args", ()))]
    for index, argument in enumerate(arguments):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "watch-namespace":
            value = value or (arguments[index + 1] if index + 1 < len(arguments) else "")
            return not value or namespace in value.split(",")
    return True


def check_nodes(nodes: Sequence[Document], pods_of_plugin: int) -> Iterator[Finding]:
    """Nodes that take pods, and those with GPUs. ``pods_of_plugin``: device plugins that run."""
    ready = [node for node in nodes if _ready(node) and not node["spec"].get("unschedulable")]
    if not ready:
        yield Finding("nodes", "fail", f"none of {len(nodes)} nodes takes pods", "see `kubectl get nodes`")
    else:
        cores = sum(quantity(_allocatable(node, "cpu") or 0) for node in ready)
        yield Finding("nodes", "ok", f"{len(ready)} of {len(nodes)} take pods, {cores:g} cores")
    having = [node for node in ready if int(_allocatable(node, "nvidia.com/gpu") or 0)]
    labelled = [node for node in ready if node["metadata"].get("labels", {}).get("nvidia.com/gpu.present")]
    if having:
        count = sum(int(_allocatable(node, "nvidia.com/gpu")) for node in having)
        tainted = sum(1 for node in having if node["spec"].get("taints"))
        yield Finding("gpus", "ok", f"{count} on {len(having)} nodes, {tainted} of which are tainted")
    elif labelled or pods_of_plugin:
        yield Finding(
            "gpus",
            "fail",
            f"{len(labelled)} nodes are labelled as having GPUs, none offers nvidia.com/gpu",
            "see the logs of NVIDIA's device plugin and of its GPU operator",
        )
    else:
        yield Finding(
            "gpus",
            "warn",
            "no node offers nvidia.com/gpu",
            "enough for the overlay dev; for gpu and mixed install NVIDIA's GPU operator or device plugin",
        )


def check_storage(classes: Sequence[Document]) -> Finding:
    """Whether a claim that names no class gets a volume."""
    key = "storageclass.kubernetes.io/is-default-class"
    default = [
        one["metadata"]["name"]
        for one in classes
        if (one["metadata"].get("annotations") or {}).get(key) == "true"
    ]
    if len(default) == 1:
        return Finding("storage", "ok", f"{default[0]} is the default class")
    if default:
        return Finding(
            "storage", "warn", f"{', '.join(default)} are all default", "take the annotation off all but one"
        )
    names = ", ".join(one["metadata"]["name"] for one in classes) or "none"
    return Finding(
        "storage", "warn", f"no default class (there are: {names})", "name one in every storageClassName"
    )


def check_crd_of_option(name: str, crd: Document | None, without: str) -> Finding:
    """A CRD that charts use only where it is asked for."""
    if crd is None:
        return Finding(name, "warn", "not installed", without)
    annotations = crd["metadata"].get("annotations") or {}
    said = annotations.get("gateway.networking.k8s.io/bundle-version") or annotations.get(
        "operator.prometheus.io/version", ""
    )
    return Finding(name, "ok", f"installed{f', {said}' if said else ''}")


def check_keys(name: str, secret: Document | None, keys: Iterable[str], optional: str = "") -> Finding:
    """A Secret and the keys that it must have, none of them empty."""
    title = f"secret {name}"
    if secret is None:
        return Finding(
            title,
            "warn" if optional else "fail",
            "not there",
            optional
            or f"kubectl create secret generic {name} "
            + " ".join(f'--from-literal={key}="$(openssl rand -hex 32)"' for key in keys),
        )
    data = secret.get("data") or {}
    missing = [key for key in keys if not data.get(key)]
    if missing:
        return Finding(title, "fail", f"lacks {', '.join(missing)}", "add the keys to the Secret")
    return Finding(title, "ok", f"has {', '.join(keys)}")


def check_permissions(chart: str, refused: Sequence[str]) -> Finding:
    """What these credentials may not do of what installing a chart takes."""
    if refused:
        return Finding(
            f"install {chart}",
            "fail",
            f"may not {', '.join(refused)}",
            "bind the ClusterRole expertmesh-installer of k8s/base to your user",
        )
    return Finding(f"install {chart}", "ok", "all that it takes is allowed")


def check_namespace(name: str, namespace: Document | None) -> Finding:
    """That it is there, and which pods it takes."""
    if namespace is None:
        return Finding("namespace", "fail", f"{name} does not exist", "kubectl apply -k k8s/overlays/dev")
    labels = namespace["metadata"].get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce")
    if level != "restricted":
        return Finding(
            "namespace",
            "warn",
            f"{name} enforces {level or 'nothing'} on pods",
            f"kubectl label namespace {name} pod-security.kubernetes.io/enforce=restricted",
        )
    return Finding("namespace", "ok", f"{name} takes restricted pods only")


def release(text: str) -> tuple[int, int] | None:
    """(major, minor) of a version as tags and servers write it."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _allocatable(node: Document, resource: str) -> str:
    return str((node.get("status", {}).get("allocatable") or {}).get(resource, ""))


def _ready(node: Document) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _dotted(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
