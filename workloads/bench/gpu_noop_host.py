"""A host in a process of its own whose experts compute nothing, and the dispatcher that asks it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator

import torch

from actors.buffers import Layout
from actors.dispatch import Dispatcher
from actors.host_server import HostServer
from actors.hosted_layer import HostedLayer
from actors.route import fixed_route
from cluster.frame import manifest_id
from cluster.messages import HostAddress
from workloads.bench.children import child
from workloads.bench.dispatch_mesh import Nothing

_MANIFEST = "be" * 32
_DEADLINE_S = 10.0


@contextlib.contextmanager
def noop_dispatcher(hidden: int, top_k: int, experts: int) -> Iterator[Dispatcher]:
    """For one layer, 0, of bfloat16 rows, all of whose experts the host has."""
    name, key = f"bench-{secrets.token_hex(4)}", secrets.token_bytes(32)
    with child(_serve, name, key, hidden, experts):
        dispatcher = Dispatcher(
            fixed_route(_MANIFEST, 0, [HostAddress(name, "here", name, "", 0)], {0: [0] * experts}),
            Layout(256, hidden, top_k, "bfloat16"),
            node_id="here",
            model=_MANIFEST,
            key=key,
            deadline_s=_DEADLINE_S,
        )
        dispatcher.peers.connect(_DEADLINE_S)
        try:
            yield dispatcher
        finally:
            dispatcher.peers.close()


def _serve(ready: Callable[[], None], name: str, key: bytes, hidden: int, experts: int) -> None:
    torch.set_num_threads(1)
    server = HostServer(
        name,
        {0: HostedLayer(Nothing(), tuple(range(experts)), experts)},
        manifest=manifest_id(_MANIFEST),
        model=_MANIFEST,
        dtype="bfloat16",
        hidden=hidden,
        key=key,
    )
    server.listen_unix(name)
    ready()
