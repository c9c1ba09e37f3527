"""One local Ray cluster, and one process that has imported vLLM, for all tests that ask for them."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.auth import ensure_token, ray_environment
from cluster.config import RayConfig
from cluster.ray_cluster import connected
from tests.integration.same_tokens_worker import ENVIRONMENT
from tests.integration.vllm_forks import VllmForks, vllm_forks

# Ray reads how to authenticate when it is imported, which test modules do: hence here, and not in a fixture.
_folder = Path(tempfile.mkdtemp(prefix="expertmesh-test-token-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
_token = _folder / "token"
ensure_token(_token)
os.environ.update(ray_environment(_token))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A cluster of this process's own, with a token of its own; its address. Its node is said to have two GPUs."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"GPU": 2}))
            address = stack.enter_context(connected(RayConfig(token_path=str(_token))))
        yield address


@pytest.fixture(scope="session")
def forks() -> Iterator[VllmForks]:
    """Jobs in processes of their own, forked from one that has imported vLLM."""
    with vllm_forks(ENVIRONMENT) as made:
        yield made
