"""The parts of other projects' kinds that the charts use: Gateway API v1, and the Prometheus operator's monitoring v1.

Their CRDs are not beside the project. What is listed here is what their API references say; any other field is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jsonschema import Draft202012Validator

from tests.charts.helm import Object

_TEXT: Final = {"type": "string", "minLength": 1}
_DURATION: Final = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
_LABELS: Final = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Any, most: int = 64) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


_SELECTOR: Final = _object(
    matchLabels=_LABELS,
    matchExpressions=_list(_object(("key", "operator"), key=_TEXT, operator=_TEXT, values=_list(_TEXT))),
)
_SECRET_KEY: Final = _object(("name", "key"), name=_TEXT, key=_TEXT)
_RELABELING: Final = _object(sourceLabels=_list(_TEXT), targetLabel=_TEXT, action=_TEXT, regex=_TEXT)
_ENDPOINT: Final = _object(
    ("port",),
    port=_TEXT,
    path={"type": "string", "pattern": "^/"},
    interval=_DURATION,
    relabelings=_list(_RELABELING),
    authorization=_object(("credentials",), type={"const": "Bearer"}, credentials=_SECRET_KEY),
)
_NAMESPACES: Final = _object(matchNames=_list(_TEXT))
_PARENT: Final = _object(
    ("name",),
    name=_TEXT,
    namespace=_TEXT,
    sectionName=_TEXT,
    group=_TEXT,
    kind=_TEXT,
    port={"type": "integer"},
)
_RULE: Final = _object(
    ("alert", "expr"), alert=_TEXT, expr=_TEXT, **{"for": _DURATION}, labels=_LABELS, annotations=_LABELS
)
# Of a route there may be 16 rules with 64 matches each.
_ROUTE_RULE: Final = _object(
    ("backendRefs",),
    matches=_list(
        _object(
            path=_object(type={"enum": ["PathPrefix", "Exact"]}, value={"type": "string", "pattern": "^/"})
        )
    ),
    timeouts=_object(request=_DURATION, backendRequest=_DURATION),
    backendRefs=_list(_object(("name", "port"), name=_TEXT, port={"type": "integer"}), 16),
)
_SPECS: Final[Mapping[tuple[str, str], Any]] = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        parentRefs=_list(_PARENT, 32), hostnames=_list(_TEXT, 16), rules=_list(_ROUTE_RULE, 16)
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _object(
        ("selector", "endpoints"),
        selector=_SELECTOR,
        namespaceSelector=_NAMESPACES,
        endpoints=_list(_ENDPOINT),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        ("selector", "podMetricsEndpoints"),
        selector=_SELECTOR,
        namespaceSelector=_NAMESPACES,
        podMetricsEndpoints=_list(_ENDPOINT),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        ("groups",), groups=_list(_object(("name", "rules"), name=_TEXT, rules=_list(_RULE)))
    ),
}


def other_problems(item: Object) -> list[str] | None:
    """What is wrong with an object of these kinds; None for another kind."""
    spec = _SPECS.get((item["apiVersion"], item["kind"]))
    if spec is None:
        return None
    whole = _object(("metadata", "spec"), apiVersion={}, kind={}, metadata={"type": "object"}, spec=spec)
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in Draft202012Validator(whole).iter_errors(item)
    ]
