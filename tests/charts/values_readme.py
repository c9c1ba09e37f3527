"""The table of values in a chart's README.md, made from the comments `# --` of its values.yaml.

`python -m tests.charts.values_readme` writes it anew for every chart; a test holds that it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.charts.helm import CHARTS

_KEY: Final = re.compile(r"( *)([A-Za-z0-9_-]+):")
_COMMENT: Final = re.compile(r" *# (-- )?(.*)")
_BEGIN: Final = "<!-- values: made from values.yaml by `python -m tests.charts.values_readme` -->"
_END: Final = "<!-- end of values -->"


@dataclass(frozen=True)
class Value:
    """One documented key."""

    key: str
    default: Any
    description: str


def documented(text: str) -> list[Value]:
    """Every key of a values.yaml that has a description, in the file's order."""
    values = yaml.safe_load(text)
    found: list[Value] = []
    path: list[tuple[int, str]] = []
    comment: list[str] | None = None
    for line in text.splitlines():
        if match := _COMMENT.fullmatch(line):
            if match[1]:
                comment = [match[2]]
            elif comment is not None:
                comment.append(match[2])
            continue
        key = _KEY.match(line)
        if key is None:
            comment = None
            continue
        while path and path[-1][0] >= len(key[1]):
            path.pop()
        path.append((len(key[1]), key[2]))
        if comment is not None:
            names = [name for _, name in path]
            found.append(Value(".".join(names), _at(values, names), " ".join(comment)))
            comment = None
    return found


def undocumented(text: str) -> Iterator[str]:
    """Keys without a description of their own, of what they are part of, or of all their parts."""
    known = {value.key for value in documented(text)}
    for key in _leaves(yaml.safe_load(text), ()):
        if not any(".".join(key[:length]) in known for length in range(1, len(key) + 1)):
            yield ".".join(key)


def _leaves(value: Any, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, (*above, key))
    else:
        yield above


def _at(values: Any, names: list[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def table(text: str) -> str:
    """The table in Markdown."""
    rows = [
        f"| `{value.key}` | `{json.dumps(value.default, ensure_ascii=False)}` | {value.description} |"
        for value in documented(text)
    ]
    return "\n".join(["| value | default | meaning |", "| --- | --- | --- |", *rows])


def renewed(readme: str, values: str) -> str:
    """The README with its table as it is to be; ValueError if it has no place for one."""
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"README.md has no lines {_BEGIN} and {_END}")
    return f"{before}{_BEGIN}\n\n{table(values)}\n\n{_END}{after}"


def rewrite(chart: Path) -> None:
    """Write one chart's table."""
    readme = chart / "README.md"
    readme.write_text(renewed(readme.read_text(), (chart / "values.yaml").read_text()))


if __name__ == "__main__":
    for found in sorted(CHARTS.glob("*/Chart.yaml")):
        rewrite(found.parent)
