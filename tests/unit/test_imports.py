"""Imports point one way, workloads → actors → cluster, and the ground stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("cluster", "actors", "workloads")


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def imports(source: str, *, module_level_only: bool) -> Iterator[str]:
    """Top-level packages that a module imports; not what only type checkers see."""
    waiting: list[ast.AST] = [parsed(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", ""),
            getattr(node.test, "attr", ""),
        ):
            waiting.extend(node.orelse)
        elif not (
            module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            waiting.extend(ast.iter_child_nodes(node))


def offenders(package: str, forbidden: set[str], *, module_level_only: bool = False) -> list[str]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no modules in {package}"
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file.read_text("utf-8"), module_level_only=module_level_only)
        if name in forbidden
    ]


def test_the_reader_of_imports_sees_what_it_should() -> None:
    source = """
import ray.util
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
try:
    from vllm import LLM
except ImportError:
    pass
def f():
    import numpy
class C:
    import yaml
"""
    assert set(imports(source, module_level_only=True)) == {"ray", "typing", "vllm", "yaml"}
    assert set(imports(source, module_level_only=False)) == {"ray", "typing", "vllm", "yaml", "numpy"}


def test_cluster_imports_no_torch_and_nothing_above_it() -> None:
    assert offenders("cluster", {"torch", "vllm", "transformers", "actors", "workloads", "tests"}) == []


def test_cluster_imports_ray_only_inside_functions() -> None:
    assert offenders("cluster", {"ray"}, module_level_only=True) == []


def test_actors_import_nothing_above_them() -> None:
    assert offenders("actors", {"workloads", "tests"}) == []


def test_workloads_import_no_tests() -> None:
    assert offenders("workloads", {"tests"}) == []


def test_importing_the_ground_loads_neither_torch_nor_ray() -> None:
    modules = ["cluster.config", "cluster.placement", "cluster.table", "cluster.auth"]
    heavy = "[m for m in ('torch', 'ray', 'vllm', 'transformers', 'numpy') if m in sys.modules]"
    # One process for all: what one loads stays for those behind it.
    program = "".join(f"import {module}; print('{module}', {heavy})\n" for module in modules)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.stdout.splitlines(), run.stderr) == ([f"{module} []" for module in modules], "")


def test_unit_tests_cannot_start_ray() -> None:
    import ray

    with pytest.raises(AssertionError, match="without Ray"):
        ray.init()
    with pytest.raises(AssertionError, match="without Ray"):
        ray.put(1)  # starts Ray by itself, were it not forbidden
