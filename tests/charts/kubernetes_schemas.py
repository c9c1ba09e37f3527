"""Objects held against Kubernetes' own schemas, of several versions; unknown fields are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Final

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.charts.helm import Object

# The oldest that charts are for, one in between, the newest.
VERSIONS: Final = ("1.29", "1.34", "1.37")
POD_TEMPLATE: Final = "io.k8s.api.core.v1.PodTemplateSpec"


def schema_problems(item: Object, version: str) -> list[str] | None:
    """What the schema of that version says against an object; None if it knows no such kind."""
    # As in the package's file names: rbac.authorization.k8s.io/v1 → rbac-v1.
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", item["apiVersion"])
    name = f"{item['kind'].lower()}-{group}.json"
    return _held_against(json.dumps(item, sort_keys=True), version, file=name)


def template_problems(template: Mapping[str, Any], version: str) -> list[str]:
    """The same of a pod template, wherever it is embedded."""
    found = _held_against(json.dumps(template, sort_keys=True), version, definition=POD_TEMPLATE)
    assert found is not None
    return found


def pod_templates(item: Object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every pod template within an object, with its path; of a Pod the object itself."""
    if item["kind"] == "Pod":
        yield f"Pod/{item['metadata']['name']}", item
        return
    yield from _templates(item, f"{item['kind']}/{item['metadata']['name']}")


def _templates(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, dict):
        if "containers" in (value.get("spec") or {}):
            yield path, value
            return
        for key, below in value.items():
            if key != "metadata":
                yield from _templates(below, f"{path}.{key}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            name = below.get("groupName", index) if isinstance(below, dict) else index
            yield from _templates(below, f"{path}[{name}]")


def definitions(version: str) -> Mapping[str, Any]:
    """All definitions of one version, by their full names."""
    return _definitions(version)["$defs"]


@lru_cache(maxsize=4096)
def _held_against(text: str, version: str, file: str = "", definition: str = "") -> list[str] | None:
    # By content: most objects are the same in most renderings.
    validator = _validator(version, file, definition)
    if validator is None:
        return None
    found = validator.iter_errors(json.loads(text))
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


@cache
def _validator(version: str, file: str, definition: str) -> Draft202012Validator | None:
    shared = _definitions(version)
    if definition:
        schema: Any = {"$ref": f"{shared['$id']}#/$defs/{definition}"}
    else:
        found = _folder(version).joinpath(file)
        if not found.is_file():
            return None
        schema = json.loads(found.read_text())
        # A relative reference to the definitions needs a base.
        schema.setdefault("$id", shared["$id"].replace("_definitions", file.removesuffix(".json")))
    return Draft202012Validator(schema, registry=Registry().with_resource(shared["$id"], _resource(version)))


def _folder(version: str) -> Any:
    return resources.files("kubernetes_validate").joinpath(
        f"kubernetes-json-schema/v{version}.0-local-strict"
    )


@cache
def _definitions(version: str) -> Mapping[str, Any]:
    return json.loads(_folder(version).joinpath("_definitions.json").read_text())


@cache
def _resource(version: str) -> Resource[Any]:
    return Resource.from_contents(_definitions(version))
