"""From pydantic's errors to messages an operator can act on: where, which key, which value, the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, Final, NoReturn, get_args

from pydantic import BaseModel, ByteSize, ValidationError
from pydantic_core import ErrorDetails

from cluster.config_sources import KeyPath, Mistake, Sources, dotted
from cluster.errors import ConfigError

REFERENCE: Final = "docs/configuration.md describes every key"
# Values that must not reach a terminal or a log, not even wrong ones.
_SECRET: Final = (
    ("server", "api_keys"),
    ("versions", "options"),
    ("learning", "options"),
    ("learning", "capture"),
)
# difflib's 0.6 would ask whether "gpu" was meant to be "cpu"; two swapped letters of four are 0.75.
_ALIKE: Final = 0.7


class BadValue(ValueError):
    """Raised by validators; ``path`` is the key at fault where that isn't the checked one."""

    def __init__(self, problem: str, way_out: str = "", path: KeyPath | None = None) -> None:
        super().__init__(problem)
        self.way_out = way_out
        self.path = path


def raise_mistakes(mistakes: Sequence[Mistake]) -> NoReturn:
    """Raise one ConfigError that lists all mistakes, those of the file by line."""
    order = sorted(mistakes, key=lambda m: (m.origin.kind != "file", m.origin.line))
    if len(order) == 1:
        raise ConfigError(str(order[0]), order[0].way_out)
    lines = [f"{mistake}\n    {mistake.way_out}" for mistake in order]
    raise ConfigError(f"{len(order)} mistakes in the configuration:\n  " + "\n  ".join(lines), REFERENCE)


def schema_mistakes(schema: type[BaseModel], error: ValidationError, sources: Sources) -> list[Mistake]:
    """One mistake for each of pydantic's errors; ``schema`` knows the valid keys and defaults."""
    return [_mistake(schema, details, sources) for details in error.errors()]


def _mistake(schema: type[BaseModel], details: ErrorDetails, sources: Sources) -> Mistake:
    path: KeyPath = tuple(part for part in details["loc"] if part != "[key]")
    shown = None if path[:2] in _SECRET else _shown(details["input"])
    problem, way_out = _explain(schema, details, path)
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, BadValue) and cause.path:
        path, shown = cause.path, None
    return Mistake(sources.origin(path), dotted(path), shown, problem, way_out)


def _explain(schema: type[BaseModel], details: ErrorDetails, path: KeyPath) -> tuple[str, str]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key", _closest_key(schema, path)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        near = get_close_matches(str(value), allowed, n=1, cutoff=_ALIKE)
        guess = f"did you mean {near[0]}? " if near else ""
        return "not one of the allowed values", f"{guess}allowed: {', '.join(allowed)}"
    if kind in ("model_type", "model_attributes_type"):
        section = _section(schema, path)
        return "should be a mapping of keys to values", f"its keys: {', '.join(section.model_fields)}"
    if kind == "tuple_type":
        return "should be a list", f"an entry has the keys {', '.join(_section(schema, path).model_fields)}"
    if kind == "missing":
        return "is missing", REFERENCE
    if kind == "dict_type":
        return "should be a mapping of keys to values", REFERENCE
    if kind == "string_type":
        return "should be a text", "put it in quotes"
    if kind == "value_error":
        cause = context["error"]
        return str(cause), getattr(cause, "way_out", "") or _default_hint(schema, path)
    problem = details["msg"].removeprefix("Input ").removesuffix(", unable to parse string as an integer")
    return problem[0].lower() + problem[1:], _default_hint(schema, path)


def _closest_key(schema: type[BaseModel], path: KeyPath) -> str:
    key = str(path[-1])
    siblings = list(_section(schema, path[:-1]).model_fields)
    if near := get_close_matches(key.replace("-", "_").lower(), siblings, n=1):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    if elsewhere := [dotted(known) for known in _keys(schema) if known[-1] == key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"valid keys here: {', '.join(siblings)}"


def _default_hint(schema: type[BaseModel], path: KeyPath) -> str:
    names = [part for part in path if isinstance(part, str)]
    field = _section(schema, path[: len(path) - 1]).model_fields.get(names[-1]) if names else None
    if field is None or field.is_required() or isinstance(field.default, BaseModel | tuple | dict):
        return REFERENCE
    return "the default is " + ("null" if field.default is None else _shown(field.default) or "")


def _section(schema: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    """The model at ``path``, or the nearest one above it."""
    for part in path:
        if isinstance(part, str) and (field := schema.model_fields.get(part)):
            schema = _model_of(field.annotation) or schema
    return schema


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _keys(schema: type[BaseModel], above: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in schema.model_fields.items():
        inner = _model_of(field.annotation)
        # `placement.replicas` is a number or a section.
        if inner is None or int in get_args(field.annotation):
            yield (*above, name)
        if inner is not None:
            yield from _keys(inner, (*above, name))


def _shown(value: object) -> str | None:
    """A single value as YAML would write it; ``None`` for anything larger, which may hold secrets."""
    if isinstance(value, ByteSize):
        return value.human_readable()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, Decimal):
        return f"{value:f}"
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, int) else None
