"""Expert hosts over tiny checkpoints in this process, and engines that ask them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from actors.buffers import Layout
from actors.dispatch import Dispatcher
from actors.expert_host import ExpertHost
from actors.route import fixed_route
from cluster.checkpoint import Checkpoint
from cluster.messages import HostAddress, HostSpec

KEY = b"k" * 32
LOAD_TIMEOUT_S = 60.0


def spec(checkpoint: Checkpoint, local: tuple[int, ...], **changes: object) -> HostSpec:
    plain = HostSpec(
        host_id="local-0",
        node_id="here",
        model_path=str(checkpoint.path),
        model=checkpoint.digest,
        manifest=checkpoint.digest,
        dtype="float32",
        device="cpu",
        kernel="grouped-mm",
        threads=1,
        experts={layer.index: local for layer in checkpoint.moe_layers},
        unix=f"test-{secrets.token_hex(6)}",
        tcp_ip="",
        tcp_port=0,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@contextmanager
def running(*specs: HostSpec, key: bytes = KEY, **options: Any) -> Iterator[list[ExpertHost]]:
    """Hosts that load, ended with the block; `options` are ExpertHost's."""
    threads = torch.get_num_threads()
    # A host's own process has it from its environment, in all its threads. On some processors results depend on it.
    torch.set_num_threads(specs[0].threads)
    hosts = [ExpertHost(spec, key, **options) for spec in specs]
    try:
        for host in hosts:
            host.start()
        yield hosts
    finally:
        for host in hosts:
            host.close()
        torch.set_num_threads(threads)


@contextmanager
def dispatcher(
    checkpoint: Checkpoint, addresses: list[HostAddress], owners: list[int], node_id: str = "here"
) -> Iterator[Dispatcher]:
    route = fixed_route(
        checkpoint.digest, 1, addresses, {layer.index: owners for layer in checkpoint.moe_layers}
    )
    layout = Layout(16, checkpoint.hidden_size, checkpoint.top_k, "float32")
    made = Dispatcher(route, layout, node_id=node_id, model=checkpoint.digest, key=KEY, deadline_s=20)
    try:
        made.peers.connect(20)
        yield made
    finally:
        made.peers.close()


def batch(checkpoint: Checkpoint, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [T, H], weights [T, K] and ids [T, K], each row's experts distinct."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, checkpoint.hidden_size, generator=generator)
    weights = torch.rand(rows, checkpoint.top_k, generator=generator)
    order = torch.rand(rows, checkpoint.moe_layers[0].num_experts, generator=generator).argsort(1)
    return x, weights, order[:, : checkpoint.top_k].to(torch.int32).contiguous()
