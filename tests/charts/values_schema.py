"""Parts of charts' values.schema.json that are not written by hand: what others define.

`definitions` whose names begin with `expertmesh.` say what expertmesh.yaml may hold, from the program's own model;
those with `kubernetes.` are Kubernetes' types, so that a chart refuses what the API server would. `python -m
tests.charts.values_schema` writes them anew into every chart that uses some; a test holds that they are.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from cluster.config import Config
from tests.charts.helm import CHARTS
from tests.charts.kubernetes_schemas import definitions

# Of the version in the middle: newer fields would be refused by older clusters all the same.
_VERSION: Final = "1.34"
# A value that the program reads from a text or a number, such as a size or a duration.
_SCALAR: Final = ["string", "number", "integer"]
_PREFIX: Final = "#/definitions/"


def refreshed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its `expertmesh.` and `kubernetes.` definitions as they are to be, and no others of that kind."""
    own = {
        name: value
        for name, value in schema.get("definitions", {}).items()
        if not name.startswith(("expertmesh.", "kubernetes."))
    }
    made: dict[str, Any] = {}
    wanted = list(_references({**schema, "definitions": own}))
    while wanted:
        name = wanted.pop()
        if name in own or name in made:
            continue
        made[name] = _definition(name)
        wanted += _references(made[name])
    return {**schema, "definitions": {**own, **dict(sorted(made.items()))}}


def _definition(name: str) -> Any:
    origin, _, rest = name.partition(".")
    if origin == "kubernetes":
        return _kubernetes(definitions(_VERSION)[f"io.k8s.{rest}"])
    if rest.startswith("Config."):
        # The part of one key, such as expertmesh.Config.hosts.0.autoscale.
        return _of_key(rest.split(".")[1:])
    raise KeyError(f"nothing defines {name}")


def _kubernetes(schema: Any) -> Any:
    """Without descriptions and extensions, and with references to where the parts are here."""
    if isinstance(schema, list):
        return [_kubernetes(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        # A property may be called "description", whose value then is a schema.
        if (
            key.startswith("x-")
            or key == "$schema"
            or (key in ("description", "default") and not isinstance(value, dict))
        ):
            continue
        if key == "$ref":
            return {"$ref": _PREFIX + "kubernetes." + value.rpartition("/")[2].removeprefix("io.k8s.")}
        kept[key] = _kubernetes(value)
    return kept


def _references(schema: Any) -> Iterable[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value.removeprefix(_PREFIX)
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _of_key(path: list[str]) -> Any:
    """The schema of one key of expertmesh.yaml; a number stands for any item of a list."""
    model: type[BaseModel] | None = Config
    field = None
    for part in path:
        assert model is not None, f"{part} is not a section's"
        if not part.isdecimal():
            field = model.model_fields[part]
            model = _only_model(field.annotation)
    return _object(model) if model is not None and _is_section(field) else _field(field)


def _only_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [model for item in get_args(annotation) if (model := _only_model(item)) is not None]
    return found[0] if len(found) == 1 else None


def _is_section(field: Any) -> bool:
    """Whether nothing else than a mapping is meant, or none at all."""
    return all(get_origin(part) is None for part in get_args(field.annotation)) and not any(
        "Validator" in type(item).__name__ for item in field.metadata
    )


def _object(model: type[BaseModel]) -> dict[str, Any]:
    fields = {name: _field(field) for name, field in model.model_fields.items()}
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    made: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": fields}
    return {**made, "required": required} if required else made


def _field(field: Any) -> dict[str, Any]:
    # pydantic takes what Annotated says of a field apart; a validator of its own reads other types than it makes.
    if any("Validator" in type(item).__name__ for item in field.metadata):
        return _read(field.annotation)
    return _type(field.annotation)


def _read(annotation: Any) -> dict[str, Any]:
    """What a validator of the program's own may be given: a scalar, or the mapping or list that it makes."""
    kinds: list[Any] = list(_SCALAR)
    if type(None) in get_args(annotation):
        kinds.append("null")
    model = _only_model(annotation)
    if model is not None:
        return {"anyOf": [{"type": kinds}, _object(model)]}
    if get_origin(annotation) in (tuple, dict):
        return {"anyOf": [{"type": kinds}, _type(annotation)]}
    return {"type": kinds}


def _type(annotation: Any) -> dict[str, Any]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = any("Validator" in type(item).__name__ for item in parts[1:])
        return _read(parts[0]) if own else _type(parts[0])
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(part) for part in parts]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is tuple:
        return {"type": "array", "items": _type(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(parts[1])}
    if annotation is Any:
        return {}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _object(annotation)
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return {"type": names[annotation]} if annotation in names else {"type": list(_SCALAR)}


def rewrite(file: Path) -> None:
    """Write a chart's schema anew, if it uses definitions of this kind."""
    schema = json.loads(file.read_text())
    file.write_text(formatted(refreshed(schema)))


def formatted(schema: Mapping[str, Any]) -> str:
    """As schemas are kept."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for found in sorted(CHARTS.glob("*/values.schema.json")):
        rewrite(found)
