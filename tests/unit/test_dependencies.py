"""What the code imports and what pyproject.toml declares are the same packages."""

from __future__ import annotations

import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.unit.test_imports import LAYERS, ROOT, imports

# Comes with pydantic, pinned by it to one exact version; the name that a package is imported by where it is absent.
_PART_OF = {"pydantic-core": "pydantic", "cuda": "cuda-bindings"}


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {normal(re.split(r"[\[<>=!~ ;]", line, maxsplit=1)[0]) for line in lines}


@cache
def imported() -> dict[str, set[str]]:
    """Distribution → files that import it."""
    owners = packages_distributions()
    found: dict[str, set[str]] = {}
    for layer in LAYERS:
        for file in (ROOT / layer).rglob("*.py"):
            for name in imports(file.read_text("utf-8"), module_level_only=False):
                if name in sys.stdlib_module_names or name in LAYERS:
                    continue
                for owner in {normal(owner) for owner in owners.get(name, [name])}:
                    found.setdefault(_PART_OF.get(owner, owner), set()).add(str(Path(file).relative_to(ROOT)))
    return found


def test_everything_imported_is_declared() -> None:
    undeclared = {
        name: files
        for name, files in imported().items()
        if name not in declared("cpu", "gpu", "bench", "signing")
    }
    assert undeclared == {}


def test_everything_declared_is_imported() -> None:
    assert declared() - set(imported()) == set()


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## Dependencies")[2]
    explained = {
        normal(name)
        for line in text.splitlines()
        for name in re.findall(r"[a-z0-9-]+", line.split("|")[1] if "|" in line else "")
    }
    assert declared() - explained == set()
