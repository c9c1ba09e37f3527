from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from ray.core.generated import autoscaler_pb2

from actors.ray_node_provider import RayNodeProvider, Standing, standing
from tests.node_provider_contract import CPU, NodeProviderContract, Room


class MemoryAutoscaler:
    """Keeps the last request, as Ray does."""

    heeds_labels = True

    def __init__(self) -> None:
        self.provider = RayNodeProvider(self)
        self.says: Standing | None = Standing()
        self._kept: list[tuple[dict[str, float], dict[str, str]]] = []

    def request(self, bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> None:
        self._kept = list(zip(bundles, selectors, strict=True))

    def standing(self) -> Standing | None:
        return self.says

    def requested(self) -> Mapping[Room, int]:
        return Counter((frozenset(room.items()), frozenset(labels.items())) for room, labels in self._kept)


@pytest.fixture
def world() -> MemoryAutoscaler:
    return MemoryAutoscaler()


class TestMemory(NodeProviderContract):
    """The contract over an autoscaler in memory."""


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (Standing(), "Ray's autoscaler is asked for 2 × (4 CPU + 3 GiB where zone: b)"),
        (Standing({"worker": 2}), "; starting 2 × worker"),
        (Standing(failed=("1 × worker: old", "1 × worker: no quota")), "; failed: 1 × worker: no quota"),
        (Standing(unfit=2), "; no node type has room for 2 of them, or all are at their limit"),
        (None, "it heeds no labels and does not say what it does"),
    ],
)
def test_what_becomes_of_it(world: MemoryAutoscaler, says: Standing | None, expected: str) -> None:
    world.provider.request({"cpu": CPU})
    world.says = says
    assert expected in world.provider.describe()


def test_ray_s_message() -> None:
    state = autoscaler_pb2.AutoscalingState()
    state.pending_instance_requests.add(ray_node_type_name="worker", count=2)
    state.pending_instances.add(ray_node_type_name="worker")
    state.failed_instance_requests.add(ray_node_type_name="gpu", count=1, reason="new", failed_ts=20)
    state.failed_instance_requests.add(ray_node_type_name="gpu", count=3, reason="old", failed_ts=10)
    constraint = state.infeasible_cluster_resource_constraints.add()
    constraint.resource_requests.add(count=4)
    constraint.resource_requests.add(count=1)
    assert standing(state) == Standing({"worker": 3}, ("3 × gpu: old", "1 × gpu: new"), 5)
    assert standing(autoscaler_pb2.AutoscalingState()) == Standing()
