"""`expertmesh serve` as a child of the chaos harness, and proof of what is left of it in the end.

Every process that it starts, however deep, inherits a mark in its environment. By it the family is found, and
nothing is ever signalled that does not carry it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from actors.failpoints import VARIABLE
from cluster.config import Config
from cluster.errors import ExpertmeshError, HostError
from workloads import run_file
from workloads.bench import shared_memory
from workloads.bench.process_marks import environment, marked
from workloads.bench.ray_nodes import RayNodes

MARK = "EXPERTMESH_CHAOS_RUN"
_START_S = 900.0
_END_S = 90.0
# Ray's processes see their parent's end within a few seconds; on busy cores later.
_LINGER_S = 30.0
_POLL_S = 0.1
# 1 is PR_SET_PDEATHSIG: a harness that is killed can't end its server, which then ends by itself.
_SERVE = (
    f"import ctypes; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); "
    "from workloads.cli import main; main()"
)
# Titles of the mesh's own processes on a cluster that goes on; Serve's ends with its last application.
_ACTORS = ("ray::HostActor", "ray::ControllerActor", "ray::Serve")
_OPENMP = "__KMP_REGISTERED_LIB_"


@dataclass(frozen=True, slots=True)
class Left:
    """What outlived the server: names of processes, entries of /dev/shm, network namespaces and links."""

    processes: tuple[str, ...]
    shared_memory: tuple[str, ...]
    networks: tuple[str, ...] = ()


class ServerChild:
    """A running `expertmesh serve` in a session of its own: Ctrl-C does not reach it, `end` does."""

    def __init__(self, folder: Path, config: Config, nodes: RayNodes | None = None) -> None:
        """`nodes` is the cluster that it serves on, if that is not its own; it ends with the server."""
        self._nodes = nodes
        self.url = f"http://{config.server.host}:{config.server.port}"
        self._mark = nodes.environment[MARK] if nodes else uuid.uuid4().hex
        self._shared_memory = shared_memory.names()
        self._stopped: set[int] = set()
        self._known: set[int] = set()
        self._left: Left | None = None
        self._log = folder / "serve.log"
        file = folder / "mesh.yaml"
        tree = config.model_dump(mode="json", exclude_none=True)
        tree["server"].pop("api_keys")
        file.write_text(yaml.safe_dump(tree), "utf-8")
        # Settings of the operator's environment are in the file already, and would override the scenario's.
        inherited = nodes.environment if nodes else os.environ
        environment = {key: value for key, value in inherited.items() if not key.startswith("EXPERTMESH__")}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, "serve", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**environment, VARIABLE: "1", MARK: self._mark},
                start_new_session=True,
            )

    def wait_ready(self) -> run_file.Run:
        """How to reach it, once it serves; HostError with its last words if it ends before."""
        deadline = time.monotonic() + _START_S
        while True:
            for run in run_file.running():
                if run.pid == self.process.pid:
                    self.family()
                    return run
            if self.process.poll() is not None:
                raise HostError(
                    f"the server did not start: {last_words(self._log.read_text(errors='replace'))}"
                )
            if time.monotonic() > deadline:
                raise HostError(f"the server was not ready within {_START_S:.0f} s")
            time.sleep(_POLL_S)

    def family(self) -> list[psutil.Process]:
        """Every process of it that lives."""
        found = marked(MARK, self._mark)
        self._known.update(process.pid for process in found)
        return found

    def titled(self, title: str) -> int | None:
        """The pid of the process of the family that calls itself so (Ray's actors: `ray::Class`)."""
        for process in self.family():
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].partition(".")[0] == title:
                    return process.pid
        return None

    def signal(self, pid: int, number: signal.Signals) -> int:
        """Send a signal; the time at which it was sent in nanoseconds of CLOCK_MONOTONIC.

        ExpertmeshError if the process is gone or is none of the family.
        """
        try:
            if environment(psutil.Process(pid)).get(MARK) != self._mark:
                raise ExpertmeshError(
                    f"process {pid} is not of this server", "its mesh has changed meanwhile"
                )
            if number == signal.SIGSTOP:
                self._stopped.add(pid)
            now_ns = time.monotonic_ns()
            os.kill(pid, number)
        except (psutil.NoSuchProcess, ProcessLookupError) as error:
            raise ExpertmeshError(
                f"process {pid} has ended already", "the fault before it went further"
            ) from error
        if number == signal.SIGCONT:
            self._stopped.discard(pid)
        return now_ns

    def end(self) -> Left:
        """End the server and tell what outlived it; that is killed, one by one. A second call does nothing."""
        if self._left is not None:
            return self._left
        for pid in list(self._stopped):
            with contextlib.suppress(ExpertmeshError):
                self.signal(pid, signal.SIGCONT)
        if self._nodes is not None:
            self._nodes.mend()
        self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_S)
        networks: list[str] = []
        outlived: list[str] = []
        if self._nodes is not None:
            # The cluster takes with it whatever is on it, so what should have ended before is looked for first.
            outlived = self._outlive(lambda process: _words(process).startswith(_ACTORS))
            networks = self._nodes.close()
        names = outlived + self._outlive(lambda process: True)
        self.process.wait(_END_S)
        fresh = shared_memory.left_behind(self._shared_memory)
        self._left = Left(
            tuple(names),
            tuple(sorted(name for name in fresh if not foreign(name, self._known))),
            tuple(networks),
        )
        return self._left

    def _outlive(self, meant: Callable[[psutil.Process], bool]) -> list[str]:
        """What of the family is meant and has not ended in a while; it is killed, one by one."""
        deadline = time.monotonic() + _LINGER_S
        while (family := [p for p in self.family() if meant(p)]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        names = []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(_words(process)[:80] or process.name())
                process.kill()
        return names


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for the length of the block, in which a server ends."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def steadfast() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does, and no broken connection end the program.

    A shell script's background jobs ignore SIGINT until they say otherwise. The command line lets SIGPIPE end
    the program, which a server that was killed would cause here.
    """

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {
        # Python's own, which asyncio knows and turns into a cancellation.
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, handle),
        signal.SIGPIPE: signal.signal(signal.SIGPIPE, signal.SIG_IGN),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_words(log: str) -> str:
    """Why a server ended: its error, else the end of what it printed."""
    lines = log.strip().splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
    if errors:
        return "\n".join([lines[errors[-1]].removeprefix("error:").strip(), *lines[errors[-1] + 1 :]])
    return "\n  ".join(lines[-6:]) or "it said nothing"


def foreign(name: str, known: Container[int]) -> bool:
    """Whether an entry of /dev/shm tells that a process made it that is none of `known`.

    Intel's OpenMP runtime keeps one for each process on the machine that uses it.
    """
    parts = name.removeprefix(_OPENMP).split("_")
    return name.startswith(_OPENMP) and parts[0].isdecimal() and int(parts[0]) not in known


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
