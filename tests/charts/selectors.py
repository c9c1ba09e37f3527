"""Which pods of a rendering a selector means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.charts.helm import Object, load_objects
from tests.charts.kubernetes_schemas import pod_templates


@dataclass(frozen=True)
class Pod:
    """Pods of one template: `name` is the worker group's, "head", or the object's."""

    name: str
    labels: Mapping[str, str]
    template: Mapping[str, Any]
    replicas: int = 1

    @property
    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        found = [port for box in self.template["spec"]["containers"] for port in box.get("ports") or ()]
        return {port["name"]: port["containerPort"] for port in found}


def pods(objects: Sequence[Object]) -> list[Pod]:
    """All there would be, of Ray's groups and others, each with its labels as KubeRay merges them."""
    return [pod for item in (*objects, *kept(objects)) for pod in _pods(item)]


def kept(objects: Sequence[Object]) -> Iterator[Object]:
    """Objects of KubeRay's that are kept in ConfigMaps, to be made later."""
    for item in objects:
        for text in (item.get("data") or {}).values() if item["kind"] == "ConfigMap" else ():
            if "apiVersion: ray.io/v1" in text:
                yield from load_objects(text)


def _pods(item: Object) -> Iterator[Pod]:
    groups = dict(_ray_groups(item))
    for _path, template in pod_templates(item):
        group = groups.get(id(template))
        labels = (template.get("metadata") or {}).get("labels") or {}
        if group is None:
            replicas = (item.get("spec") or {}).get("replicas", 1)
            yield Pod(item["metadata"]["name"], labels, template, replicas)
        else:
            name = group.get("groupName", "head")
            yield Pod(name, {**labels, **(group.get("labels") or {})}, template, group.get("replicas", 1))


def _ray_groups(value: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if isinstance(value, dict):
        if "template" in value and "rayStartParams" in value:
            yield id(value["template"]), value
        for below in value.values():
            yield from _ray_groups(below)
    elif isinstance(value, list):
        for below in value:
            yield from _ray_groups(below)


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches all."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_satisfied(expression, labels) for expression in selector.get("matchExpressions") or ())


def _satisfied(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or ()
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]


def selected(selector: Mapping[str, Any], all_pods: Sequence[Pod]) -> set[str]:
    """Names of the pods that are meant."""
    return {pod.name for pod in all_pods if matches(selector, pod.labels)}
