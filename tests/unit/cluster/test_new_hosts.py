"""Hosts that join a mesh whose GPUs are shared."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from cluster.changes import Snapshot
from cluster.config import HostGroup
from cluster.deployment import Deployment
from cluster.errors import PlacementError
from cluster.fleet_view import fleet
from cluster.messages import HostSpec, NodeInfo
from cluster.new_hosts import new_hosts
from cluster.rehome import Limits
from cluster.repair_state import HostState
from cluster.table import PlacementTable

GIB = 2**30
H100 = {"ray.io/accelerator-type": "H100"}
NODES = tuple(NodeInfo(name, f"10.0.0.{n}", name, 4, 1, 8 * GIB, H100) for n, name in enumerate(("a", "b")))
GROUP = HostGroup.model_validate({"name": "gpu", "device": "cuda", "gpus": 0.3})
ENGINE = {"a": (Decimal("0.4"),)}


def snapshot(**hosts: str) -> Snapshot:
    """Hosts of the group by name, each on this node; an engine on the first node."""
    like = HostSpec(
        "", "", "/m", "m", "m", "float32", "cuda", "auto", 1, {}, "", "", 0, group="gpu", gpus=Decimal("0.3")
    )
    ids = {f"gpu-{number}": node for number, node in enumerate(hosts.values())}
    specs = tuple(replace(like, host_id=host_id, node_id=node) for host_id, node in ids.items())
    deployment = Deployment(
        "model",
        specs,
        PlacementTable("m", 0, dict.fromkeys(ids), {}).to_json(),
        limits=Limits(reserved_gpus=ENGINE),
        groups=(GROUP,),
    )
    return Snapshot(deployment, {host_id: HostState(node) for host_id, node in ids.items()}, NODES, {})


def test_they_go_beside_the_engine_while_there_is_room() -> None:
    coming = new_hosts(snapshot(first="b"), "gpu", 4)
    assert [(spec.host_id, spec.node_id, spec.gpus) for spec in coming] == [
        (f"gpu-{number}", node, Decimal("0.3")) for number, node in enumerate("aabb", 1)
    ]


def test_a_share_that_no_gpu_has_left_is_refused_with_what_is_there() -> None:
    with pytest.raises(
        PlacementError, match=r"group gpu: 5 of 6 hosts get 0\.3 of a GPU each: a has 1 GPU, of"
    ):
        new_hosts(snapshot(first="b"), "gpu", 5)


def test_what_they_may_hold_is_their_share_of_the_gpu() -> None:
    (host,) = fleet(snapshot(first="a"), {})
    assert host.memory_bytes == int(80 * GIB * 0.8 * 0.3)
