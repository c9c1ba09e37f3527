"""What crosses a process boundary: small frozen dataclasses, all in one place. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node of the Ray cluster as the inventory sees it."""

    node_id: str
    ip: str
    hostname: str
    cpus: float
    gpus: float
    memory_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One mixture-of-experts layer of a checkpoint."""

    index: int
    """Position in the decoder stack, as in ``model.layers.<index>``."""
    num_experts: int
    expert_parameters: int
    """Number of scalar parameters of one expert; times the item size gives its bytes."""


@dataclass(frozen=True, slots=True)
class HostSlot:
    """One expert host to be: a device share on a node."""

    host_id: str
    group: str
    device: str
    node_id: str
    memory_bytes: int
    threads: int


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a running expert host listens."""

    host_id: str
    node_id: str
    unix: str
    """Name in Linux's abstract socket namespace, without the leading NUL."""
    tcp: str
    """``ip:port``; empty where the host serves its own node only."""
    pid: int


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host says of itself after loading, and in ``status``."""

    address: HostAddress
    experts_loaded: int
    weight_bytes: int
    rss_bytes: int
    load_seconds: float
    kernel: str
