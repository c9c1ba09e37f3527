from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from ray.core.generated import autoscaler_pb2

from actors.ray_node_provider import RayNodeProvider, Standing, standing
from cluster.node_shape import NodeShape
from tests.node_provider_contract import CPU, RAY_ASKED_FOR_NOTHING, NodeProviderContract, Room


class MemoryAutoscaler:
    """Keeps the last request, as Ray does."""

    heeds_labels = True
    nothing = RAY_ASKED_FOR_NOTHING

    def __init__(self) -> None:
        self.provider = RayNodeProvider(self)
        self.says: Standing | None = Standing()
        self.room: int | None = None
        """Hosts that its types of nodes have room for."""
        self._kept: list[tuple[dict[str, float], dict[str, str]]] = []

    def request(self, bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> None:
        self._kept = list(zip(bundles, selectors, strict=True))

    def standing(self) -> Standing | None:
        if self.room is not None and len(self._kept) > self.room:
            return Standing(impossible=True)
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
        (
            Standing(impossible=True),
            "; not all of it is possible: no node type fits, or all are at their limit",
        ),
        (None, "it heeds no labels and does not say what it does"),
    ],
)
def test_what_becomes_of_it(world: MemoryAutoscaler, says: Standing | None, expected: str) -> None:
    world.provider.request({"cpu": CPU})
    world.says = says
    assert expected in world.provider.describe()


def zones(world: MemoryAutoscaler) -> dict[str, int]:
    """Hosts asked for by zone."""
    return {dict(labels)["zone"]: count for (_, labels), count in world.requested().items()}


def shapes(**counts: int) -> dict[str, NodeShape]:
    return {zone: NodeShape(count, 1, labels={"zone": zone}) for zone, count in counts.items()}


def test_of_what_is_impossible_as_much_as_can_be_is_asked_for(world: MemoryAutoscaler) -> None:
    world.room = 6
    world.provider.request(shapes(a=3, b=1))
    asked = []
    for _ in range(5):
        world.provider.request(shapes(a=3, b=6))
        asked.append(zones(world))
    # What was there before is not given up for more of the other.
    assert asked == [{"a": 3, "b": count} for count in (6, 5, 4, 3, 3)]
    assert (
        "3 × (1 CPU where zone: b); 3 more are not possible: no node type fits" in world.provider.describe()
    )


def test_another_wish_and_a_while_later_the_same_are_tried_in_full(world: MemoryAutoscaler) -> None:
    world.room = 2
    for _ in range(5):
        world.provider.request(shapes(b=4))
    assert zones(world) == {"b": 2}
    world.provider.request(shapes(b=3))
    assert zones(world) == {"b": 3}
    world.provider.request(shapes(b=3))
    assert zones(world) == {"b": 2}
    world.room = 3
    for _ in range(100):
        world.provider.request(shapes(b=3))
    assert zones(world) == {"b": 3}
    assert "not possible" not in world.provider.describe()


def test_where_nothing_is_possible_nothing_is_left_to_ask_for(world: MemoryAutoscaler) -> None:
    world.room = 0
    for _ in range(4):
        world.provider.request(shapes(a=1, b=1))
    assert zones(world) == {}
    assert "asked for nothing; 2 more are not possible" in world.provider.describe()


def test_ray_s_message() -> None:
    state = autoscaler_pb2.AutoscalingState()
    state.pending_instance_requests.add(ray_node_type_name="worker", count=2)
    state.pending_instances.add(ray_node_type_name="worker")
    state.failed_instance_requests.add(ray_node_type_name="gpu", count=1, reason="new", failed_ts=20)
    state.failed_instance_requests.add(ray_node_type_name="gpu", count=3, reason="old", failed_ts=10)
    state.infeasible_cluster_resource_constraints.add()
    assert standing(state) == Standing({"worker": 3}, ("3 × gpu: old", "1 × gpu: new"), impossible=True)
    assert standing(autoscaler_pb2.AutoscalingState()) == Standing()
