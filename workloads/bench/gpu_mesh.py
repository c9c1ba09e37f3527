"""Expert hosts in processes of their own and the table of them: a mesh on one machine without Ray, to be measured."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from cluster.checkpoint import Checkpoint
from cluster.errors import HostError
from cluster.messages import EngineSettings, HostAddress, HostReport, HostSpec
from cluster.table import PlacementTable

NODE: Final = "here"
_LOAD_S: Final = 240.0

Holdings = Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One host, and what it is to hold."""

    host_id: str
    device: str
    """cpu, or cuda with a number."""
    experts: Holdings
    kernel: str = "auto"
    threads: int = 1


@dataclass
class GpuMesh:
    """Running hosts; experts are asked of them in the order of `plans`."""

    checkpoint: Checkpoint
    dtype: str
    plans: Sequence[HostPlan]
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    addresses: dict[str, HostAddress] = field(default_factory=dict)
    reports: dict[str, HostReport] = field(default_factory=dict)
    processes: dict[str, BaseProcess] = field(default_factory=dict)
    _pipes: dict[str, Any] = field(default_factory=dict)
    _epoch: int = 0

    def table(self, first: Mapping[int, Sequence[str]] | None = None) -> str:
        """The hosts that run, as JSON: a new epoch with each call.

        `first`: layer → per expert the host to ask first of those that hold it; the first of `plans` if None.
        """
        self._epoch += 1
        running = [plan for plan in self.plans if plan.host_id in self.addresses]
        holders: dict[int, list[list[str]]] = {
            layer.index: [[] for _ in range(layer.num_experts)] for layer in self.checkpoint.moe_layers
        }
        for plan in running:
            for layer, experts in plan.experts.items():
                for expert in experts:
                    holders[layer][expert].append(plan.host_id)
        if first is not None:
            for layer, rows in holders.items():
                for expert, hosts in enumerate(rows):
                    hosts.sort(key=lambda host, wanted=first[layer][expert]: host != wanted)  # type: ignore[misc]
        return PlacementTable(
            self.checkpoint.digest,
            self._epoch,
            dict(self.addresses),
            {layer: tuple(map(tuple, rows)) for layer, rows in holders.items()},
        ).to_json()

    def settings(self, deadline_s: float = 20.0) -> EngineSettings:
        """For an engine of this mesh."""
        return EngineSettings(
            table=self.table(),
            model=self.checkpoint.digest,
            moe_layers=tuple(layer.index for layer in self.checkpoint.moe_layers),
            node_id=NODE,
            hidden=self.checkpoint.hidden_size,
            top_k=self.checkpoint.top_k,
            dtype=self.dtype,
            max_rows=2048,
            deadline_s=deadline_s,
            connect_timeout_s=20.0,
        )

    def kill(self, host_id: str) -> None:
        """End a host as kill -9 does, and forget it."""
        process = self.processes.pop(host_id)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        del self.addresses[host_id]

    def start(self, plan: HostPlan) -> None:
        """Start a host and wait until it serves; HostError with its own words if it can't."""
        self._await(plan, *self._spawn(plan))

    def _spawn(self, plan: HostPlan) -> tuple[BaseProcess, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        spec = HostSpec(
            host_id=plan.host_id,
            node_id=NODE,
            model_path=str(self.checkpoint.path),
            model=self.checkpoint.digest,
            manifest=self.checkpoint.digest,
            dtype=self.dtype,
            device=plan.device,
            kernel=plan.kernel,
            threads=plan.threads,
            experts={layer: tuple(experts) for layer, experts in plan.experts.items()},
            unix=f"bench-{secrets.token_hex(4)}-{plan.host_id}",
            tcp_ip="",
            tcp_port=0,
        )
        process = context.Process(target=_host, args=(theirs, spec, self.key), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _await(self, plan: HostPlan, process: BaseProcess, pipe: Any) -> None:
        # A host ends when its pipe does.
        self.processes[plan.host_id], self._pipes[plan.host_id] = process, pipe
        if not pipe.poll(_LOAD_S):
            raise HostError(f"host {plan.host_id} did not load in {_LOAD_S:.0f} s")
        said = pipe.recv()
        if isinstance(said, str):
            raise HostError(f"host {plan.host_id}: {said}")
        self.reports[plan.host_id] = said
        self.addresses[plan.host_id] = said.address

    def close(self) -> None:
        """End all hosts."""
        for process in self.processes.values():
            process.kill()
            process.join()


@contextlib.contextmanager
def gpu_mesh(model: Path, dtype: str, plans: Sequence[HostPlan]) -> Iterator[GpuMesh]:
    """The hosts of `plans`, started side by side, until the block ends."""
    mesh = GpuMesh(Checkpoint.open(model), dtype, plans)
    try:
        started = [(plan, *mesh._spawn(plan)) for plan in plans]
        for plan, process, pipe in started:
            mesh._await(plan, process, pipe)
        yield mesh
    finally:
        mesh.close()


def all_experts(checkpoint: Checkpoint) -> Holdings:
    """Every expert of every layer."""
    return {layer.index: tuple(range(layer.num_experts)) for layer in checkpoint.moe_layers}


def _host(pipe: Any, spec: HostSpec, key: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    from actors.expert_host import ExpertHost

    host = ExpertHost(spec, key)
    host.start()
    try:
        host.wait_ready(_LOAD_S)
        pipe.send(host.report())
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
