"""The provider's contract for nodes that an operator brings, and what is said of one that does not ask."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cluster.external_nodes import ExternalNodeProvider
from tests.node_provider_contract import CPU, NodeProviderContract, Room, rooms


class Operator:
    """Asks what is wanted, as one does over the admin API."""

    heeds_labels = True
    nothing = "no nodes are wanted"

    def __init__(self) -> None:
        self.now = 0.0
        self.provider = ExternalNodeProvider(lambda: self.now)
        self.provider.wanted()

    def requested(self) -> Mapping[Room, int]:
        return rooms(self, *self.provider.wanted().values())


@pytest.fixture
def world() -> Operator:
    return Operator()


class TestExternal(NodeProviderContract):
    """The contract over an operator that asks."""


def test_an_operator_that_does_not_ask_is_missed() -> None:
    never = ExternalNodeProvider(lambda: 0.0)
    never.request({"cpu": CPU})
    assert "have room for cpu 2 × (4 CPU" in never.describe() and "nobody ever asked" in never.describe()


def test_an_operator_that_asks_no_more_is_missed(world: Operator) -> None:
    world.now = 59.0
    assert world.provider.describe() == world.nothing
    world.now = 61.0
    assert "nobody asked for 61 s: does `expertmesh operator` run?" in world.provider.describe()
    world.provider.wanted()
    assert world.provider.describe() == world.nothing
