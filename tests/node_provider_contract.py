"""What a provider of nodes promises, whoever brings them.

Unit tests run it over an autoscaler in memory and over what an operator asks, integration tests over Ray's autoscalers.
A subclass gives the fixture `world`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Protocol

from cluster.node_shape import NodeShape
from cluster.ports import NodeProvider

Room = tuple[frozenset[tuple[str, float]], frozenset[tuple[str, str]]]
"""Resources and labels of one host, as the autoscaler has them."""

CPU = NodeShape(2, 4, memory_bytes=3 * 2**30, labels={"zone": "b"})
GPU = NodeShape(1, 1, gpus=Decimal("0.4"), labels={"kind": "in(a100, h100)", "zone": "!b"})


RAY_ASKED_FOR_NOTHING = "Ray's autoscaler is asked for nothing"


class World(Protocol):
    """A provider, and who brings nodes for it."""

    @property
    def provider(self) -> NodeProvider: ...

    @property
    def heeds_labels(self) -> bool: ...

    @property
    def nothing(self) -> str:
        """How it describes that it asks for nothing."""

    def requested(self) -> Mapping[Room, int]:
        """What it was asked for, as who brings nodes sees it."""


def rooms(world: World, *shapes: NodeShape) -> Counter[Room]:
    """The same, as it should be."""
    found: Counter[Room] = Counter()
    for shape in shapes:
        named = {"CPU": shape.cpus, "GPU": shape.gpus, "memory": shape.memory_bytes}
        resources = frozenset((name, float(amount)) for name, amount in named.items() if amount)
        labels = {(key, value.replace(" ", "")) for key, value in shape.labels.items()}
        found[resources, frozenset(labels if world.heeds_labels else ())] += shape.count
    return found


class NodeProviderContract:
    def test_what_is_requested_arrives(self, world: World) -> None:
        world.provider.request({"cpu": CPU, "gpu": GPU})
        assert world.requested() == rooms(world, CPU, GPU)

    def test_the_last_request_counts(self, world: World) -> None:
        world.provider.request({"cpu": CPU, "gpu": GPU})
        more = NodeShape(5, 4, memory_bytes=3 * 2**30, labels={"zone": "b"})
        world.provider.request({"cpu": more})
        assert world.requested() == rooms(world, more)

    def test_groups_of_the_same_kind_need_room_each(self, world: World) -> None:
        world.provider.request({"one": CPU, "other": CPU})
        assert world.requested() == rooms(world, CPU, CPU)

    def test_the_same_again_changes_nothing(self, world: World) -> None:
        for _ in range(2):
            world.provider.request({"cpu": CPU})
            assert world.requested() == rooms(world, CPU)

    def test_nothing_is_asked_for_after_zero_or_none(self, world: World) -> None:
        for nothing in ({"cpu": NodeShape(0, 4)}, {}):
            world.provider.request({"cpu": CPU})
            world.provider.request(nothing)
            assert world.requested() == {}
            assert world.provider.describe() == world.nothing

    def test_the_description_is_one_line_that_says_what_was_asked_for(self, world: World) -> None:
        world.provider.request({"cpu": CPU, "gpu": GPU})
        text = world.provider.describe()
        assert "2 × (4 CPU + 3 GiB where zone: b)" in text
        assert "1 × (1 CPU + 0.4 GPU where kind: in(a100, h100), zone: !b)" in text
        assert "\n" not in text
