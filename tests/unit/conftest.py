"""Unit tests may import Ray, for its types and decorators, but not start or join a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from actors import known_maths


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


@pytest.fixture(autouse=True, scope="session")
def forget_maths(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What earlier runs found out about tiny models would hide that it is found out wrongly now."""
    folder: Path = tmp_path_factory.mktemp("cache")
    known_maths.cache_folder = lambda: folder  # type: ignore[assignment]
