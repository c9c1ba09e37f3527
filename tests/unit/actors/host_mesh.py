"""Host servers over real sockets in one process, for tests of what an engine does with them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

import torch

from actors.buffers import Layout
from actors.dispatch import Dispatcher
from actors.host_server import HostedLayer, HostServer
from actors.route import Route, fixed_route
from cluster.messages import HostAddress

HIDDEN, EXPERTS, TOP_K, LAYER = 8, 6, 2, 3
MANIFEST = "ab" * 32
KEY = b"k" * 32


class ScaledRows:
    """Expert e multiplies a row by e + 1, so every mix-up of rows, experts or weights shows."""

    def __init__(self, owned: tuple[int, ...]) -> None:
        self._factors = torch.tensor([float(e + 1) for e in owned])
        self.before: Callable[[], None] = lambda: None

    def compute(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        self.before()
        factor = torch.where(slots >= 0, self._factors[slots.clamp(min=0).long()], 0.0) * weights
        out.copy_(x.float() * factor.sum(1, keepdim=True))


class Mesh:
    """Hosts with the experts that each owns; each can be stopped and started again under its address."""

    def __init__(self, owned: list[tuple[int, ...]], dtype: str, transport: str) -> None:
        self.dtype, self.transport = dtype, transport
        self.owned = owned
        self.experts = [ScaledRows(o) for o in owned]
        self.servers: list[HostServer] = []
        self.dispatchers: list[Dispatcher] = []
        self.addresses: list[HostAddress] = []
        for position in range(len(owned)):
            name = f"test-{secrets.token_hex(6)}"
            server, tcp = self._serve(position, name, 0)
            self.servers.append(server)
            self.addresses.append(HostAddress(f"h{position}", "here", name, tcp, 0))

    def _serve(self, position: int, name: str, port: int) -> tuple[HostServer, str]:
        owned = self.owned[position]
        server = HostServer(
            f"h{position}",
            {LAYER: HostedLayer(self.experts[position], owned, EXPERTS)},
            manifest=int(MANIFEST[:16], 16),
            model="model",
            dtype=self.dtype,
            hidden=HIDDEN,
            key=KEY,
            kernel_lock=threading.Lock(),  # each server stands for a process of its own
        )
        server.listen_unix(name)
        return server, server.listen_tcp("127.0.0.1", port)

    def restart(self, position: int) -> None:
        address = self.addresses[position]
        self.servers[position], _ = self._serve(position, address.unix, int(address.tcp.split(":")[1]))

    def route(self, epoch: int = 1, hosts: Sequence[int] | None = None) -> Route:
        """The table's view of these hosts (positions), all by default."""
        hosts = range(len(self.owned)) if hosts is None else hosts
        replicas = []
        for expert in range(EXPERTS):
            holders = [i for i, p in enumerate(hosts) if expert in self.owned[p]]
            # As a table does it: the holders take turns in being asked first.
            turn = expert % max(len(holders), 1)
            replicas.append(holders[turn:] + holders[:turn])
        return fixed_route(MANIFEST, epoch, [self.addresses[p] for p in hosts], {LAYER: replicas})

    def dispatcher(self, **changes: object) -> Dispatcher:
        route = changes.pop("route", None) or self.route()
        options: dict = {
            "node_id": "here" if self.transport == "unix" else "elsewhere",
            "model": "model",
            "key": KEY,
            "deadline_s": 5.0,
        }
        layout = changes.pop("layout", Layout(16, HIDDEN, TOP_K, self.dtype))
        dispatcher = Dispatcher(route, layout, **{**options, **changes})  # type: ignore[arg-type]
        dispatcher.peers.connect(5.0)
        self.dispatchers.append(dispatcher)
        return dispatcher

    def close(self) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.peers.close()
        for server in self.servers:
            server.close()


def batch(rows: int, dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights, ids and the sums that are due."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator).to(getattr(torch, dtype))
    weights = torch.rand(rows, TOP_K, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)]).int()
    expected = x.float() * (weights * (ids + 1)).sum(1, keepdim=True)
    return x, weights, ids, expected
