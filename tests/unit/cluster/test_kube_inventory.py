"""Nodes of Kubernetes by class."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube_inventory import class_rows, node_classes
from cluster.kube_objects import quantity, read_node

GIB = 2**30


def node(name: str, cpu: str, memory: str, zone: str = "", **more: Any) -> dict[str, Any]:
    labels = {"kubernetes.io/hostname": name, **more.pop("labels", {})}
    if zone:
        labels["topology.kubernetes.io/zone"] = zone
    allocatable = {"cpu": cpu, "memory": memory, **more.pop("allocatable", {})}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": more,
        "status": {
            "allocatable": allocatable,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


GPU = {
    "allocatable": {"nvidia.com/gpu": "8"},
    "labels": {"nvidia.com/gpu.product": "H100", "nvidia.com/gpu.memory": "81920"},
    "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", 0.5),
        ("16", 16),
        ("64Gi", 64 * GIB),
        ("1e3", 1000),
        ("2k", 2000),
        ("7910500Ki", 7910500 * 1024),
    ],
)
def test_quantities(text: str, number: float) -> None:
    assert quantity(text) == number


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="much"):
        quantity("much")


def test_nodes_that_are_alike_are_a_class_whatever_their_zone_and_what_passes() -> None:
    cordon = [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]
    nodes = [
        node("c1", "15500m", "64Gi", "a"),
        node("c2", "15500m", "64Gi", "b", taints=cordon, unschedulable=True),
        node("c3", "4", "16Gi", "a"),
        node("g1", "96", "1024Gi", "b", **GPU),
    ]
    gpu, large, small = node_classes(map(read_node, nodes))
    assert (gpu.device, gpu.product, gpu.gpus, gpu.gpu_memory_mib) == ("nvidia.com/gpu", "H100", 8, 81920)
    assert gpu.taints == ("nvidia.com/gpu=present:NoSchedule",) and gpu.nodes == ("g1",)
    assert (large.nodes, large.zones, large.cpus, large.memory_bytes) == (
        ("c1", "c2"),
        ("a", "b"),
        15.5,
        64 * GIB,
    )
    assert large.taints == () and large.going == (("c2", "is cordoned"),)
    assert (small.device, small.gpus, small.nodes, small.going) == ("cpu", 0, ("c3",), ())


def test_a_table_for_people() -> None:
    heads, *rows = class_rows(node_classes(map(read_node, [node("g1", "96", "1Ti", "b", **GPU)])))
    assert heads[:4] == ("nodes", "device", "CPUs", "memory")
    assert rows == [
        ("1", "8 × H100 80 GiB", "96", "1024.0 GiB", "b", "nvidia.com/gpu=present:NoSchedule", "")
    ]
