"""Which series a PromQL expression reads, and which the program, vLLM and Ray export."""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from actors.router_metrics import MeshMetrics, RoutingMetrics, VersionMetrics

_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS: Final = re.compile(r"\{[^{}]*\}")
_GROUPING: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_RANGE: Final = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?![a-zA-Z0-9_:])(?!\s*\()")
_WORDS: Final = frozenset({"and", "or", "unless", "bool", "by", "without", "inf", "nan"})
_OF_HISTOGRAM: Final = ("_bucket", "_sum", "_count")


def series(expression: str) -> set[str]:
    """Names of the series that it reads. ValueError if its brackets do not close."""
    plain = _STRINGS.sub('""', expression)
    for opening, closing in ("()", "{}", "[]"):
        if plain.count(opening) != plain.count(closing):
            raise ValueError(f"{expression}: {opening} without {closing}")
    # The order counts: labels and ranges hold names that are none of series.
    for pattern in (_LABELS, _RANGE, _GROUPING):
        plain = pattern.sub(" ", plain)
    return {name for name in _NAME.findall(plain) if name.lower() not in _WORDS}


@lru_cache(maxsize=1)
def exported() -> frozenset[str]:
    """All that a Prometheus would have of a mesh, and `up`, which it makes itself."""
    return frozenset({"up"}) | _own() | _vllm() | _ray()


def _own() -> frozenset[str]:
    registry = CollectorRegistry()
    for kind in (MeshMetrics, RoutingMetrics, VersionMetrics):
        kind(registry)
    return frozenset(metric.name for metric in registry.collect())


def _vllm() -> frozenset[str]:
    text = _source("vllm", "v1/metrics/loggers.py")
    found = set()
    for kind, name in re.findall(r"_(gauge|counter|histogram)_cls\(\s*name=\"(vllm:\w+)\"", text):
        found |= {
            name + end for end in {"gauge": ("",), "counter": ("_total",), "histogram": _OF_HISTOGRAM}[kind]
        }
    return frozenset(found)


def _ray() -> frozenset[str]:
    names = re.findall(r"Gauge\(\s*\"(\w+)\"", _source("ray", "dashboard/modules/reporter/reporter_agent.py"))
    return frozenset(f"ray_{name}" for name in names)


def _source(package: str, file: str) -> str:
    # Read, not imported: importing vLLM takes seconds.
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return (Path(found.origin).parent / file).read_text()
