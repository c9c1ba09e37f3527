"""How a mesh ends that was hurt."""

from __future__ import annotations

from types import SimpleNamespace

from workloads.bench.chaos_mesh import Mesh
from workloads.bench.chaos_server import Left


def test_the_connection_is_closed_before_its_cluster_ends() -> None:
    happened: list[str] = []
    left = Left((), (), ())

    def end() -> Left:
        happened.append("end")
        return left

    child = SimpleNamespace(url="http://127.0.0.1:1", end=end)
    mesh = Mesh(child, "space", "tiny", 8, disconnect=lambda: happened.append("disconnect"))  # type: ignore[arg-type]
    assert mesh.end() is left
    assert happened == ["disconnect", "end"]
