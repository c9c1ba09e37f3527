"""One local Ray cluster for all tests that ask for it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.auth import ensure_token, ray_environment
from cluster.config import RayConfig
from cluster.ray_cluster import connected

# Ray reads how to authenticate when it is imported, which test modules do: hence here, and not in a fixture.
_folder = Path(tempfile.mkdtemp(prefix="expertmesh-test-token-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
_token = _folder / "token"
ensure_token(_token)
os.environ.update(ray_environment(_token))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A cluster of this process's own, with a token of its own; its address."""
    with connected(RayConfig(token_path=str(_token))) as address:
        yield address
