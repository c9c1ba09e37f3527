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

    # For the whole process, never undone: a thread that a test leaves behind must not start Ray later either.
    for place, name in (
        (ray, "init"),
        (ray._private.worker, "init"),
        (ray._private.worker, "connect"),
        (ray.util.client.ray, "connect"),
    ):
        setattr(place, name, _refuse)
