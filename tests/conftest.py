"""How the slow tests are divided over processes: what shares a server, a cluster or an import stays together."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.own_shared_memory import own_shared_memory

# The longest come first. A group is a process's own while it runs; tests of other files are a group each.
_GROUPS = {
    "e2e/test_chaos.py": None,
    "e2e/test_versions.py": "versions",
    "e2e/test_learning.py": "learning",
    "e2e/test_default_model.py": None,
    "integration/test_nodes.py": "nodes",
    "e2e/test_bad_input.py": None,
    "integration/test_training_job.py": "training",
    "e2e/test_abrupt_ends.py": None,
    "e2e/test_autoscale.py": "autoscale",
    "e2e/test_two_engines.py": "two engines",
    "integration/test_same_tokens.py": "vllm",
    "integration/test_capacity.py": "vllm",
    "integration/test_default_model.py": "vllm",
    "integration/test_versions_on_s3.py": "s3",
    "integration/test_charts_on_api_server.py": "kube",
    "integration/test_k8s_on_api_server.py": "kube",
    "integration/test_operator_on_api_server.py": "kube",
    "integration/test_operated_mesh.py": "kube",
    "integration/test_ray_service.py": "ray service",
    "e2e/test_live_changes.py": "server",
    "e2e/test_api_errors.py": "server",
    "e2e/test_openai_client.py": "server",
}
_HERE = Path(__file__).parent

# Importing torch, transformers and all test modules makes a million objects that stay. Looking through them again
# and again is a third of what collecting tests costs, and much of what any later collection of garbage does.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and getattr(config.option, "loadgroup", False):
        own_shared_memory()
        # Commands that look for "the" running server are not to find another process's.
        folder = tempfile.mkdtemp(prefix="expertmesh-test-run-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["XDG_RUNTIME_DIR"] = folder


def pytest_collection_finish() -> None:
    gc.freeze()
    # What tests import later stays as well, and Hypothesis makes and drops millions of small objects.
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(_GROUPS)

    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(_HERE).as_posix()
        return order.index(file) if file in order else len(order)

    items.sort(key=place)


class _Groups(LoadScopeScheduling):
    """Groups by file: xdist's own go by a suffix that it gives to ids of tests, which pytest 9.2 does not take."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].removeprefix("tests/")
        # By itself if it shares nothing.
        return _GROUPS.get(file, file) or nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Groups | None:
    return _Groups(config, log) if config.getoption("dist") == "loadgroup" else None
