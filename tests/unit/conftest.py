"""Unit tests may import Ray, for its types and decorators, but not start or join a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

from actors import known_maths

# For torch's OpenMP, which looks when it is loaded. There are as many workers as cores, and threads of each: those
# that wait would spin on the cores that others compute on, which made some tests five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _refuse(*_args: object, **_kwargs: object) -> NoReturn:
    raise AssertionError(
        "unit tests run without Ray: test the plain class, or move the test to tests/integration"
    )


# A deadline would measure what else runs on the machine. Half as many examples as Hypothesis has by itself: where more
# are needed to find what a test is for, it says so.
settings.register_profile("unit", deadline=None, max_examples=50)
settings.load_profile("unit")


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
def no_waiting_for_the_disk() -> None:
    """The machine's power is not cut during a test: what a file has must not be on the disk before it goes on."""
    os.fsync = lambda _: None  # type: ignore[assignment]


@pytest.fixture(autouse=True, scope="session")
def forget_maths(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What earlier runs found out about tiny models would hide that it is found out wrongly now."""
    folder: Path = tmp_path_factory.mktemp("cache")
    known_maths.cache_folder = lambda: folder  # type: ignore[assignment]
