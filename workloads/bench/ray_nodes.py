"""A Ray cluster of several nodes on this machine: a head and labelled workers, each with an address of its own.

Every process of a node inherits marks in its environment. By them it is found, and nothing is signalled that does
not carry them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster import niceness
from cluster.auth import ray_environment
from cluster.errors import HostError
from cluster.ray_cluster import QUIET
from workloads.bench.chaos_network import Network
from workloads.bench.ports import free_port
from workloads.bench.process_marks import kill_all, marked

HEAD = "head"
_NODE = "EXPERTMESH_RAY_NODE"
"""The cluster's folder and the node's name."""
_START_S = 120.0
_END_S = 20.0
_POLL_S = 0.1
# Ray gives a node 30 seconds to be seen in the control plane, and no setting changes that; on a machine under load
# one was not, once in some hundred starts.
_STARTS = 2
_TOO_BUSY = "The current node timed out during startup"
_OBJECT_STORE_BYTES = 80 * 2**20
# 1 is PR_SET_PDEATHSIG: a node ends with the program that started it, however that ends. Ray has its own
# processes end with `ray start --block` in the same way.
_RAY = (
    f"import ctypes; ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}); "
    "from ray.scripts.scripts import main; main()"
)


@dataclass(frozen=True, slots=True)
class Worker:
    """A node beside the head."""

    name: str
    cpus: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    """``zone=<name>`` if there are none."""
    memory_bytes: int = 0
    """What Ray may give out; 0 for what the machine has."""
    namespace: bool = False
    """Whether it gets a network namespace of its own, so that it can be cut off."""
    before: tuple[str, ...] = ()
    """What its command line begins with, to run it in namespaces of other kinds."""


class RayNodes:
    """Starts nodes and ends them. `close` must be called, however the use of it ends."""

    def __init__(
        self, token: Path, workers: Sequence[Worker] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` is that of every process, beside the program's own; `token` the file of the cluster's."""
        self._workers = {worker.name: worker for worker in workers}
        self._network: Network | None = None
        self.address = ""
        """Where the head listens, once it does."""
        # Unix socket paths are short, so Ray's folder must be as well.
        self._folder = Path(tempfile.mkdtemp(prefix="em", dir="/tmp"))
        self._places: dict[str, tuple[str, Sequence[str]]] = {}
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._gcs: tuple[list[str], dict[str, str]] | None = None
        """Command and environment of a control plane that was killed."""
        self._cut: set[str] = set()
        self.environment = {
            **os.environ,
            **(environment or {}),
            **QUIET,
            **ray_environment(token),
            "RAY_TMPDIR": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            niceness.RAY_VARIABLE: niceness.of_workers(),
        }

    def start(
        self, *, head_cpus: int, persistent: bool = False, head_labels: Mapping[str, str] | None = None
    ) -> None:
        """Start the head and then every worker. HostError with Ray's words if one does not start, ExpertmeshError
        if a worker is to have a network namespace and there can be none.

        A `persistent` head keeps its tables on disk, and may be killed and started again.
        """
        if any(worker.namespace for worker in self._workers.values()):
            self._network = Network()
        ip, port = self._network.here if self._network else "127.0.0.1", free_port()
        self.address = f"{ip}:{port}"
        store = {}
        if persistent:
            store = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self._folder / "gcs")}
            (self._folder / "gcs").mkdir()
        self._start(
            HEAD,
            (ip, ()),
            [
                "--head",
                f"--port={port}",
                f"--num-cpus={head_cpus}",
                "--include-dashboard=false",
                *(
                    [f"--labels={','.join(f'{k}={v}' for k, v in head_labels.items())}"]
                    if head_labels
                    else ()
                ),
            ],
            store,
        )
        self.start_workers()

    def start_workers(self) -> None:
        """Start the workers that do not run: all at first, later those that were killed."""
        for worker in self._workers.values():
            if not self.processes(worker.name):
                labels = worker.labels or {"zone": worker.name}
                self._start(
                    worker.name,
                    self._place(worker),
                    [
                        f"--address={self.address}",
                        f"--num-cpus={worker.cpus}",
                        f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
                        *([f"--memory={worker.memory_bytes}"] if worker.memory_bytes else ()),
                    ],
                    {},
                )

    def join(self, worker: Worker) -> None:
        """One worker more."""
        self._workers[worker.name] = worker
        self.start_workers()

    def leave(self, node: str) -> None:
        """End a worker that will not come back; its address is nobody else's."""
        self.kill_node(node)
        del self._workers[node]

    def ip(self, node: str) -> str:
        """The address of a worker that was started."""
        return self._places[node][0]

    def processes(self, node: str) -> list[psutil.Process]:
        """All of a node that lives."""
        return marked(_NODE, f"{self._folder}:{node}")

    def kill_node(self, node: str) -> int:
        """SIGKILL of the raylet and of all that the node runs; when, in nanoseconds of CLOCK_MONOTONIC."""
        # First the raylet, which would tell the cluster of the others' end.
        members = sorted(self.processes(node), key=lambda process: _name(process) != "raylet")
        now_ns = time.monotonic_ns()
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        kill_all(functools.partial(self.processes, node), _END_S)
        return now_ns

    def kill_control_plane(self) -> int:
        """SIGKILL of the head's control plane (Ray's GCS) alone; when, as above."""
        process = psutil.Process(self.control_plane_pid())
        # It looks after the head's processes, and would end all of them with the first.
        watcher = psutil.Process(self._started[HEAD].pid)
        watcher.suspend()
        deadline = time.monotonic() + _END_S
        while watcher.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._gcs = process.cmdline(), process.environ()
        now_ns = time.monotonic_ns()
        process.kill()
        return now_ns

    def start_control_plane(self) -> int:
        """Start what `kill_control_plane` killed, as it was; when, as above."""
        assert self._gcs is not None, "it was not killed"
        (command, environment), self._gcs = self._gcs, None
        now_ns = time.monotonic_ns()
        with self._log("gcs").open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._started["gcs"] = process
        return now_ns

    def cut(self, node: str) -> int:
        """Drop what goes to the node and comes from it, without a word; when, as above."""
        assert self._network is not None
        self._cut.add(node)
        self._network.cut(node)
        return time.monotonic_ns()

    def heal(self, node: str) -> int:
        """Undo `cut`; when, as above."""
        assert self._network is not None
        self._network.heal(node)
        self._cut.discard(node)
        return time.monotonic_ns()

    def mend(self) -> None:
        """Heal what is cut and start a control plane that was killed, so that the mesh can end in good order."""
        for node in sorted(self._cut):
            self.heal(node)
        if self._gcs is not None:
            self.start_control_plane()

    def close(self) -> list[str]:
        """End every node, workers first, and take the network away; names of networks that could not be."""
        for node in (*self._workers, HEAD):
            kill_all(functools.partial(self.processes, node), _END_S)
        for process in self._started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        network, self._network = self._network, None
        return network.close() if network else []

    def _place(self, worker: Worker) -> tuple[str, Sequence[str]]:
        """A worker's address, and what comes before its command; the same for its next life.

        Nodes must not share one: Ray takes the first that has a program's own for the program's node.
        """
        if worker.name not in self._places:
            if worker.namespace:
                assert self._network is not None
                self._places[worker.name] = self._network.add_namespace(worker.name)
            elif self._network is not None:
                self._places[worker.name] = self._network.add_address(), ()
            else:
                self._places[worker.name] = f"127.0.0.{len(self._places) + 2}", ()
        ip, prefix = self._places[worker.name]
        return ip, (*prefix, *worker.before)

    def _start(
        self,
        name: str,
        place: tuple[str, Sequence[str]],
        arguments: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        for left in reversed(range(_STARTS)):
            self._started[name] = self._launch(name, place, arguments, environment)
            told = self._started_or_told(name)
            if told is None:
                return
            kill_all(functools.partial(self.processes, name), _END_S)
            if not left or _TOO_BUSY not in told:
                raise HostError(f"Ray's node {name} did not start:\n{told.strip()[-2000:]}")

    def _launch(
        self,
        name: str,
        place: tuple[str, Sequence[str]],
        arguments: Sequence[str],
        environment: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        ip, prefix = place
        ports = [free_port() for _ in range(4)]
        with self._log(name).open("wb") as out:
            return subprocess.Popen(
                [
                    *prefix,
                    *(sys.executable, "-c", _RAY, "start"),
                    *arguments,
                    "--block",
                    f"--node-ip-address={ip}",
                    f"--object-store-memory={_OBJECT_STORE_BYTES}",
                    f"--node-manager-port={ports[0]}",
                    f"--object-manager-port={ports[1]}",
                    f"--metrics-export-port={ports[2]}",
                    f"--dashboard-agent-listen-port={ports[3]}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment, _NODE: f"{self._folder}:{name}"},
                start_new_session=True,
            )

    def _started_or_told(self, name: str) -> str | None:
        """Wait until a node has started: None then, and what it said if it has ended instead."""
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in (told := self._log(name).read_text(errors="replace")):
            if self._started[name].poll() is not None:
                return told
            if time.monotonic() > deadline:
                return f"not within {_START_S:.0f} s\n{told}"
            time.sleep(_POLL_S)
        return None

    def control_plane_pid(self) -> int:
        """The process that `kill_control_plane` kills; HostError if it does not run."""
        found = [process.pid for process in self.processes(HEAD) if _name(process) == "gcs_server"]
        if not found:
            raise HostError(
                "the head's control plane (gcs_server) does not run", "its log is in Ray's folder"
            )
        return found[0]

    def _log(self, name: str) -> Path:
        return self._folder / f"ray-{name}.log"


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
