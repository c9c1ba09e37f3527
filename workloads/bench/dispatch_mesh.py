"""The measured path: real host servers in processes of their own, the dispatcher in this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from actors.buffers import Layout
from actors.dispatch import Dispatcher
from actors.expert_kernels import NoopLayer
from actors.host_server import HostServer
from actors.hosted_layer import HostedLayer
from actors.route import fixed_route
from cluster.frame import manifest_id
from cluster.messages import HostAddress

EXPERTS, TOP_K, LAYER, DTYPE = 8, 2, 0, "float32"
# As `serve` sizes its connections.
_MAX_ROWS = 2048
_MANIFEST = _MODEL = "be" * 32
_NODE = "here"
_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class HostJob:
    """One of the servers that a process runs: host ``position`` of ``hosts``, for rows of ``hidden``."""

    run: str
    position: int
    hosts: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.run}-{self.hidden}-{self.hosts}-{self.position}"

    @property
    def owned(self) -> tuple[int, ...]:
        """Its even share of the experts, in a run."""
        share = EXPERTS // self.hosts
        return tuple(range(self.position * share, (self.position + 1) * share))


class Nothing(NoopLayer):
    """Experts that do not even touch the rows: what is left is the transport."""

    def compute(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        pass


def jobs_of_process(run: str, process: int, hosts: Sequence[int], hidden: Sequence[int]) -> list[HostJob]:
    """What process number ``process`` serves: its host in every mesh that is large enough to have it."""
    return [HostJob(run, process, count, width) for count in hosts if process < count for width in hidden]


def serve_hosts(ready: Callable[[], None], jobs: Sequence[HostJob], key: bytes) -> None:
    """Start a server per job; they answer in threads until the process ends."""
    torch.set_num_threads(1)
    for job in jobs:
        server = HostServer(
            job.name,
            {LAYER: HostedLayer(Nothing(), job.owned, EXPERTS)},
            manifest=manifest_id(_MANIFEST),
            model=_MODEL,
            dtype=DTYPE,
            hidden=job.hidden,
            key=key,
        )
        server.listen_unix(job.name)
    ready()


@contextlib.contextmanager
def mesh_path(
    run: str,
    hosts: int,
    key: bytes,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
) -> Iterator[Callable[[], None]]:
    """A dispatch of these rows over ``hosts`` hosts, through the dispatcher that the engine uses."""
    hidden = x.shape[1]
    jobs = [HostJob(run, position, hosts, hidden) for position in range(hosts)]
    addresses = [HostAddress(job.name, _NODE, job.name, "", 0) for job in jobs]
    owners = [job.position for job in jobs for _ in job.owned]
    dispatcher = Dispatcher(
        fixed_route(_MANIFEST, 0, addresses, {LAYER: owners}),
        Layout(_MAX_ROWS, hidden, TOP_K, DTYPE),
        node_id=_NODE,
        model=_MODEL,
        key=key,
        deadline_s=_DEADLINE_S,
    )
    try:
        dispatcher.peers.connect(_DEADLINE_S)

        def call() -> None:
            dispatcher(LAYER, x, weights, ids, out)

        yield call
        if dispatcher.stats.lost:
            raise AssertionError("a host was lost during the measurement")
    finally:
        dispatcher.peers.close()
