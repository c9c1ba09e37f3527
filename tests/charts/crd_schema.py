"""Objects held against a CRD's structural schema, as the API server does with strict field validation.

Nulls are dropped and defaults applied first; then types, unknown fields, and the CEL rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import pytest

from tests.charts.cel_rules import broken_rules
from tests.charts.helm import ROOT, Object

Schema = Mapping[str, Any]
CRDS: Final = ROOT.parent / "shared" / "k8s" / "crds"
_KINDS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}
_BITS: Final = {"int32": 32, "int64": 64}


@lru_cache(maxsize=1)
def crds() -> Mapping[tuple[str, str], Schema]:
    """KubeRay's schemas by (apiVersion, kind); skips the test where they are not beside the project."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}")
    found = {}
    for file in sorted(CRDS.glob("*.json")):
        definition = json.loads(file.read_text())["spec"]
        for version in definition["versions"]:
            key = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


def kuberay_schema(item: Object) -> Schema | None:
    """The schema of an object of KubeRay's; None for another kind."""
    return crds().get((item["apiVersion"], item["kind"]))


def crd_problems(item: Object, schema: Schema, before: Object | None = None) -> list[str]:
    """What the API server would refuse, each with its path; `before` is what an update replaces."""
    ready = with_defaults(item, schema)
    old = with_defaults(before, schema) if before is not None else None
    found = list(_problems(ready, _with_metadata(schema), ""))
    # CEL is looked at only once the types are right, there too.
    return found or list(_broken(ready, old, schema, ""))


def _with_metadata(schema: Schema) -> Schema:
    # A CRD says no more of metadata than that it is an object; what is in it the API server knows itself.
    properties = {**schema["properties"], "metadata": {"x-kubernetes-preserve-unknown-fields": True}}
    return {**schema, "properties": properties}


def with_defaults(value: Any, schema: Schema) -> Any:
    """A copy without nulls, and with the schema's defaults where nothing is said."""
    if isinstance(value, dict):
        kept = {}
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            below = properties.get(key, others if isinstance(others, dict) else {})
            if item is None and not below.get("nullable"):
                continue
            kept[key] = with_defaults(item, below)
        for key, below in properties.items():
            if key not in kept and "default" in below:
                kept[key] = with_defaults(below["default"], below)
        return kept
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def _problems(value: Any, schema: Schema, path: str) -> Iterator[str]:
    if value is None:
        if not schema.get("nullable"):
            yield f"{path}: null"
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path}: {value!r} is neither a whole number nor a text"
            return
    elif kind := schema.get("type"):
        expected = _KINDS[kind]
        # A boolean is a number to Python, and none to Kubernetes.
        if not isinstance(value, expected) or (isinstance(value, bool) and kind != "boolean"):
            yield f"{path}: {value!r} is no {kind}"
            return
    yield from _scalar_problems(value, schema, path)
    if isinstance(value, dict):
        yield from _mapping_problems(value, schema, path)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{path}: fewer than {schema['minItems']}"
        for index, item in enumerate(value):
            yield from _problems(item, schema.get("items", {}), f"{path}[{index}]")
        yield from _duplicates(value, schema, path)


def _scalar_problems(value: Any, schema: Schema, path: str) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{path}: {value!r} does not match {schema['pattern']}"
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{path}: {len(value)} characters"
        if schema.get("format") == "date-time":
            try:
                datetime.fromisoformat(value)
            except ValueError:
                yield f"{path}: {value!r} is no time"
    if isinstance(value, int) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            yield f"{path}: {value} is below {schema['minimum']}"
        if (bits := _BITS.get(schema.get("format", ""))) and not -(2 ** (bits - 1)) <= value < 2 ** (
            bits - 1
        ):
            yield f"{path}: {value} does not fit into {schema['format']}"


def _mapping_problems(value: dict[str, Any], schema: Schema, path: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{path}.{key}: missing"
    for key, item in value.items():
        if key in properties:
            yield from _problems(item, properties[key], f"{path}.{key}")
        elif isinstance(others, dict):
            yield from _problems(item, others, f"{path}.{key}")
        elif not (others or schema.get("x-kubernetes-preserve-unknown-fields")):
            yield f"{path}.{key}: unknown field"


def _duplicates(value: list[Any], schema: Schema, path: str) -> Iterator[str]:
    kind = schema.get("x-kubernetes-list-type")
    if kind == "set":
        keys = [json.dumps(item, sort_keys=True) for item in value]
    elif kind == "map":
        names = schema["x-kubernetes-list-map-keys"]
        keys = [json.dumps([item.get(name) for name in names]) for item in value if isinstance(item, dict)]
    else:
        return
    for index, key in enumerate(keys):
        if key in keys[:index]:
            yield f"{path}[{index}]: {key} is there twice"


def _broken(value: Any, old: Any, schema: Schema, path: str) -> Iterator[str]:
    """The CEL rules of the schema that the value does not satisfy."""
    for message in broken_rules(schema.get("x-kubernetes-validations", ()), value, old):
        yield f"{path}: {message}"
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            below = properties.get(key, others if isinstance(others, dict) else None)
            if below is not None:
                before = old.get(key) if isinstance(old, dict) else None
                yield from _broken(item, before, below, f"{path}.{key}")
    elif isinstance(value, list) and "items" in schema:
        # Lists are atomic here or maps by name: as elsewhere, an item has no earlier self unless a key says so.
        for index, item in enumerate(value):
            yield from _broken(item, None, schema["items"], f"{path}[{index}]")
