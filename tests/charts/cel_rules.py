"""The CEL rules of CRDs, compiled and evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any


@cache
def compiled(rule: str) -> Any:
    """A program; raises celpy.CELParseError for what is no CEL."""
    import celpy

    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def broken_rules(rules: Sequence[Mapping[str, str]], value: Any, old: Any = None) -> Iterator[str]:
    """The messages of rules that `value` does not satisfy.

    A rule about what it was before is looked at only where there was something before, as the API server does.
    """
    import celpy

    for rule in rules:
        transition = "oldSelf" in rule["rule"]
        if transition and old is None:
            continue
        context = {"self": celpy.json_to_cel(value)}
        if transition:
            context["oldSelf"] = celpy.json_to_cel(old)
        if not compiled(rule["rule"]).evaluate(context):
            yield rule.get("message", rule["rule"])


def rules_of(schema: Mapping[str, Any]) -> Iterator[str]:
    """Every rule of a schema, at any depth."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield rule["rule"]
    below = [*schema.get("properties", {}).values()]
    below += [
        found for key in ("items", "additionalProperties") if isinstance(found := schema.get(key), dict)
    ]
    for item in below:
        yield from rules_of(item)
