"""The provider's contract over Ray's two autoscalers, and nodes that come and go by it."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.autoscaler.v2 import utils
from ray.core.generated import autoscaler_pb2, common_pb2
from ray.experimental import internal_kv

from actors.ray_node_provider import RayNodeProvider
from tests.integration.autoscaled_cluster import AutoscaledCluster
from tests.node_provider_contract import CPU, RAY_ASKED_FOR_NOTHING, NodeProviderContract, Room


class SecondAutoscaler:
    """What its monitor reads from the control plane, whichever monitor runs here."""

    heeds_labels = True
    nothing = RAY_ASKED_FOR_NOTHING

    def __init__(self) -> None:
        self.provider = RayNodeProvider()

    def requested(self) -> Mapping[Room, int]:
        messages: Any = autoscaler_pb2
        reply = messages.GetClusterResourceStateReply()
        reply.ParseFromString(internal_kv.internal_kv_get_gcs_client().get_cluster_resource_state())
        found: Counter[Room] = Counter()
        for constraint in reply.cluster_resource_state.cluster_resource_constraints:
            for by_count in constraint.resource_requests:
                labels = {
                    (one.label_key, _in_ray_s_notation(one))
                    for selector in by_count.request.label_selectors
                    for one in selector.label_constraints
                }
                room = frozenset(by_count.request.resources_bundle.items()), frozenset(labels)
                found[room] += by_count.count
        return found


class FirstAutoscaler:
    """Its monitor reads the request from the key-value store, without labels."""

    heeds_labels = False
    nothing = RAY_ASKED_FOR_NOTHING

    def __init__(self) -> None:
        self.provider = RayNodeProvider()

    def requested(self) -> Mapping[Room, int]:
        kept = internal_kv._internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
        assert kept is not None
        return Counter((frozenset(bundle.items()), frozenset()) for bundle in json.loads(kept))


def _in_ray_s_notation(constraint: Any) -> str:
    values = sorted(constraint.label_values)
    text = values[0] if len(values) == 1 else f"in({','.join(values)})"
    messages: Any = common_pb2
    return text if constraint.operator == messages.LABEL_OPERATOR_IN else f"!{text}"


@pytest.fixture
def second(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondAutoscaler]:
    # Ray keeps what it found out about the cluster: here, that its autoscaler is the second.
    monkeypatch.setattr(utils, "cached_is_autoscaler_v2", True)
    world = SecondAutoscaler()
    yield world
    world.provider.request({})


@pytest.fixture
def first(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FirstAutoscaler]:
    monkeypatch.setattr(utils, "cached_is_autoscaler_v2", False)
    world = FirstAutoscaler()
    yield world
    world.provider.request({})


class TestSecond(NodeProviderContract):
    @pytest.fixture
    def world(self, second: SecondAutoscaler) -> SecondAutoscaler:
        return second


class TestFirst(NodeProviderContract):
    @pytest.fixture
    def world(self, first: FirstAutoscaler) -> FirstAutoscaler:
        return first

    def test_it_is_said_that_labels_are_not_heeded(self, world: FirstAutoscaler) -> None:
        world.provider.request({"cpu": CPU})
        assert "it heeds no labels" in world.provider.describe()


@pytest.mark.slow
@pytest.mark.long
def test_nodes_come_and_go(tmp_path: Path) -> None:
    """In a program of its own: a process is connected to one cluster at a time."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    cluster = AutoscaledCluster(token, tmp_path, idle_s=2, most=3)
    try:
        cluster.start()
        done = subprocess.run(
            [sys.executable, "-m", "tests.integration.autoscaled_worker", cluster.address],
            cwd=Path(__file__).parents[2],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{cluster.log()}"
    finally:
        cluster.close()
