"""The real program in a process of its own, and proof that nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from workloads import run_file
from workloads.bench import shared_memory
from workloads.bench.process_marks import marked

# A slow machine with one engine start may take minutes; nothing here waits longer than it must.
START_S = 300.0
END_S = 90.0
_MARK = "EXPERTMESH_TEST_RUN"
_POLL_S = 0.1


def wait_for(done: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `done`; AssertionError past the time."""
    deadline = time.monotonic() + timeout_s
    while not (value := done()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(_POLL_S)
    return value


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings(model: Path, port: int, **sections: Any) -> dict[str, Any]:
    """A configuration for a tiny model on two hosts that starts fast; `sections` are merged into it."""
    base: dict[str, Any] = {
        "model": {"path": str(model), "name": "tiny"},
        "engine": {
            "enforce_eager": True,
            "max_model_len": 512,
            "kv_cache": "64MiB",
            "max_num_seqs": 16,
            "threads": 1,
        },
        "hosts": [{"name": "local", "count": 2, "threads": 1}],
        "server": {"port": port},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(base.get(name), dict) else section
    return base


class Program:
    """One `expertmesh` command in a process group of its own, its output in files.

    Every process that it starts, however deep, inherits a mark in its environment by which it is found.
    """

    def __init__(
        self, folder: Path, arguments: list[str], environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self._out, self._err = folder / "out", folder / "err"
        self._memory = shared_memory.names()
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workloads.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), _MARK: self.mark},
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for_text(self, text: str, timeout_s: float = START_S) -> None:
        """Wait until `text` is in the output; AssertionError if the program ends before."""

        def seen() -> bool:
            if text in self.out + self.err:
                return True
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode}\n{self.out}\n{self.err}"
            )
            return False

        try:
            wait_for(seen, timeout_s, f"{text!r} in the output")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.out}\n{self.err}") from None

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float = END_S) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def processes(self) -> list[psutil.Process]:
        """Everything of this program that lives."""
        return marked(_MARK, self.mark)

    def assert_gone(self, timeout_s: float = 30.0) -> None:
        """AssertionError if a process or an entry in /dev/shm stays."""
        wait_for(lambda: not self.processes(), timeout_s, f"processes to end: {self.processes()}")
        try:
            wait_for(lambda: not shared_memory.left_behind(self._memory), 10.0, "shared memory to go")
        except AssertionError as error:
            raise AssertionError(f"{error}: {shared_memory.left_behind(self._memory)}") from None

    def kill(self) -> None:
        """End whatever is left, process by process."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(END_S)


class ServerProgram(Program):
    """`expertmesh serve` with a configuration file."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "mesh.yaml"
        self.config.write_text(yaml.safe_dump(dict(config)))
        self.url = f"http://127.0.0.1:{config['server']['port']}"
        super().__init__(folder, ["serve", "--config", str(self.config)], environment)

    def wait_ready(self) -> None:
        """Wait for the line that says so."""
        self.wait_for_text(f"ready {self.url}")


def run(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = START_S
) -> Program:
    """A command that ends by itself; it must leave nothing."""
    program = Program(folder, list(arguments), environment)
    try:
        program.wait(timeout_s)
        program.assert_gone()
    finally:
        program.kill()
    return program


def refusal(program: Program) -> str:
    """The message of a command that ended with one mistake, in one line."""
    assert program.process.returncode == 1, program.err
    assert "Traceback" not in program.err + program.out
    assert program.err.count("error:") == 1, program.err
    assert program.process.pid not in [found.pid for found in run_file.running()]
    # Rich wraps nothing here, but a message may stand in several lines.
    return " ".join(program.err.split())
