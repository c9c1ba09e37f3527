"""Unit tests may import Ray, for its types and decorators, but not start or join a cluster."""

from __future__ import annotations

from typing import NoReturn

import pytest


def _refuse(*_args: object, **_kwargs: object) -> NoReturn:
    raise AssertionError(
        "unit tests run without Ray: test the plain class, or move the test to tests/integration"
    )


@pytest.fixture(autouse=True, scope="session")
def forbid_ray() -> None:
    """Make everything raise that would start a cluster or connect to one, Ray's automatic start included."""
    import ray
    import ray._private.worker
    import ray.util.client

    # Until the end of the process: a test that leaves a thread behind must not start Ray later either.
    ray.init = ray._private.worker.init = _refuse
    ray._private.worker.connect = _refuse
    ray.util.client.ray.connect = _refuse
