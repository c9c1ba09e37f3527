"""Hosts over real sockets, by both transports."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.unit.actors.host_mesh import Mesh


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_mesh() -> Iterator[Callable[..., Mesh]]:
    made: list[Mesh] = []

    def make(owned: list[tuple[int, ...]], dtype: str = "float32", transport: str = "unix") -> Mesh:
        made.append(Mesh(owned, dtype, transport))
        return made[-1]

    yield make
    for mesh in made:
        mesh.close()
