"""What engines take of the cluster, and which of its nodes can give it: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.errors import PlacementError
from cluster.gpu_shares import always_granted
from cluster.inventory import matches
from cluster.messages import NodeInfo
from workloads.config_view import show_size

# Part of an engine's share of a GPU that vLLM may take; the rest is for what CUDA itself takes for each process.
_USABLE = Decimal("0.9")
ENGINE_CPUS = 1
"""CPUs that Ray counts for an engine."""


def engine_nodes(
    nodes: Sequence[NodeInfo], selector: Mapping[str, str], here: str = "", gpus: Sequence[Decimal] = ()
) -> tuple[NodeInfo, ...]:
    """The nodes that engines may run on: those that match the selector, if there is one, with the GPUs of which each
    engine takes these shares.

    Without one all engines run on one node, where they share the server's port: the one that `serve` was called on,
    if Ray may start anything there. PlacementError if there is none.
    """
    able = [node for node in nodes if node.cpus >= ENGINE_CPUS]
    if not able:
        raise PlacementError(
            "no node of the Ray cluster has a CPU for the engine", "start nodes with --num-cpus"
        )
    if gpus:
        with_gpus = [node for node in able if always_granted(int(node.gpus), gpus)]
        if not with_gpus:
            have = ", ".join(f"{node.hostname}: {node.gpus:g}" for node in able)
            raise PlacementError(
                f"no node of the Ray cluster has {_gpus(gpus)} for the engine; GPUs there: {have}",
                "start a node with --num-gpus, or set engine.device to cpu",
            )
        able = with_gpus
    if not selector:
        return (next((node for node in able if node.node_id == here), able[0]),)
    found = tuple(node for node in able if matches(selector, node.labels))
    if not found:
        wanted = ", ".join(f"{key}: {value}" for key, value in selector.items())
        raise PlacementError(
            f"no node with a CPU{f' and {_gpus(gpus)}' if gpus else ''} matches engine.selector {wanted}",
            "label a node with `ray start --labels=...`, or leave the selector out",
        )
    return found


def reserved_gpus(config: Config, engines: Sequence[NodeInfo]) -> dict[str, tuple[Decimal, ...]]:
    """Shares of GPUs by node id that engines take, spread as above. PlacementError if a node has too few."""
    shares = config.engine.gpu_shares
    most = -(-config.engine.replicas // len(engines))
    for node in engines:
        if not always_granted(int(node.gpus), shares * most):
            raise PlacementError(
                f"{most} engines that take {_gpus(shares)} each would run on {node.hostname}, "
                f"which has {node.gpus:g}",
                "lower engine.replicas or engine.gpus, or let engine.selector match more nodes",
            )
    return {node.node_id: shares * most for node in engines} if shares else {}


def _gpus(shares: Sequence[Decimal]) -> str:
    """What an engine takes, such as ``1 GPU`` or ``0.4 GPU``."""
    return f"{sum(shares):f} GPU{'s' if len(shares) > 1 else ''}"


def reserved_memory(
    config: Config, checkpoint: Checkpoint, dtype: str, engines: Sequence[NodeInfo]
) -> dict[str, int]:
    """Bytes by node id that engines take, if they are spread evenly over the nodes they may run on."""
    each = engine_memory(config, checkpoint, dtype)
    most = -(-config.engine.replicas // len(engines))
    return {node.node_id: most * each for node in engines}


def engine_memory(config: Config, checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes that one engine takes of its node's memory; none where it holds weights and KV cache on a GPU."""
    if config.engine.device == "cuda":
        return 0
    return checkpoint.dense_bytes(dtype) + int(config.engine.kv_cache)


def engine_needs(config: Config, checkpoint: Checkpoint, dtype: str) -> str:
    """The same of one engine in words."""
    weights, cache = show_size(checkpoint.dense_bytes(dtype)), show_size(int(config.engine.kv_cache))
    return f"kept for each engine on its node: {weights} of weights, {cache} of KV cache"


def gpu_arguments(share: Decimal) -> dict[str, float]:
    """How much of its GPU vLLM may take: by default nearly all, and it refuses to start where less is free.

    That is all that it is for, since the size of the KV cache is given.
    """
    return {"gpu_memory_utilization": float(share * _USABLE)} if share < 1 else {}
