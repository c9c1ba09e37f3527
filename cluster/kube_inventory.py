"""What a Kubernetes cluster has for hosts: its nodes by class, capacity, labels and taints. Pure functions.

A class is all nodes that are alike for a scheduler: device, size, zone aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cluster.kube_disruptions import why_node_goes
from cluster.kube_objects import KubeNode, Taint, quantity

# The first that a node has: NVIDIA's feature discovery, GKE, EKS with Karpenter, AKS, AMD.
_GPU_PRODUCTS: Final = (
    "nvidia.com/gpu.product",
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "kubernetes.azure.com/accelerator",
    "amd.com/gpu.product-name",
    "beta.amd.com/gpu.product-name",
)
_GPU_BYTES: Final = "nvidia.com/gpu.memory"
_INSTANCE: Final = ("node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type")
_ZONE: Final = ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone")
# Taints that every node may have for a while, or that its drain sets.
_PASSING: Final = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/")


@dataclass(frozen=True, slots=True)
class NodeClass:
    """Nodes that are alike."""

    device: str
    """cpu, or the GPU's resource, such as nvidia.com/gpu."""
    product: str
    """Of the GPU, as its label says; "" for none."""
    gpus: int
    """Of each node, allocatable, like the following."""
    cpus: float
    memory_bytes: int
    instance: str
    taints: tuple[str, ...]
    """That a pod must tolerate, as key=value:effect."""
    nodes: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()
    going: tuple[tuple[str, str], ...] = ()
    """Nodes that will not stay, with the reason."""
    gpu_memory_mib: int = 0
    """Of one GPU; 0 if no label says."""


def node_classes(nodes: Iterable[KubeNode]) -> tuple[NodeClass, ...]:
    """The nodes by class: GPUs first, then by size."""
    found: dict[NodeClass, list[KubeNode]] = {}
    for node in nodes:
        found.setdefault(_kind(node), []).append(node)
    classes = [
        replace(
            kind,
            nodes=tuple(sorted(node.name for node in alike)),
            zones=tuple(sorted({zone for node in alike if (zone := _first(node.labels, _ZONE))})),
            going=tuple(sorted((node.name, why) for node in alike if (why := why_node_goes(node)))),
        )
        for kind, alike in found.items()
    ]
    return tuple(sorted(classes, key=lambda c: (-c.gpus, c.product, -c.cpus, -c.memory_bytes, c.nodes)))


def class_rows(classes: Sequence[NodeClass]) -> list[tuple[str, ...]]:
    """A table for people, its first row the headings: one class a row."""
    rows: list[tuple[str, ...]] = [("nodes", "device", "CPUs", "memory", "zones", "taints", "leaving")]
    for c in classes:
        memory = f" {c.gpu_memory_mib / 1024:.0f} GiB" if c.gpu_memory_mib else ""
        device = "cpu" if c.device == "cpu" else f"{c.gpus} × {c.product or c.device}{memory}"
        rows.append(
            (
                f"{len(c.nodes)}{f' × {c.instance}' if c.instance else ''}",
                device,
                f"{c.cpus:g}",
                f"{c.memory_bytes / 2**30:.1f} GiB",
                ", ".join(c.zones),
                ", ".join(c.taints),
                "; ".join(f"{node} {why}" for node, why in c.going),
            )
        )
    return rows


def _kind(node: KubeNode) -> NodeClass:
    """Its class, with no nodes in it yet."""
    amounts = {name: quantity(text) for name, text in node.allocatable.items()}
    gpu = next((name for name, amount in amounts.items() if name.endswith("/gpu") and amount >= 1), "")
    memory = node.labels.get(_GPU_BYTES, "")
    return NodeClass(
        device=gpu or "cpu",
        product=_first(node.labels, _GPU_PRODUCTS) if gpu else "",
        gpus=int(amounts.get(gpu, 0)),
        cpus=amounts.get("cpu", 0.0),
        memory_bytes=int(amounts.get("memory", 0)),
        instance=_first(node.labels, _INSTANCE),
        taints=tuple(sorted(_words(taint) for taint in node.taints if not taint.key.startswith(_PASSING))),
        gpu_memory_mib=int(memory) if gpu and memory.isdigit() else 0,
    )


def _first(labels: Mapping[str, str], keys: Iterable[str]) -> str:
    return next((labels[key] for key in keys if labels.get(key)), "")


def _words(taint: Taint) -> str:
    return f"{taint.key}{f'={taint.value}' if taint.value else ''}:{taint.effect}"
