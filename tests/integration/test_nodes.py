"""Several nodes: a head and two labelled workers on this machine, hosts on the workers, rows over TCP."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.programs import Program, ServerProgram, free_port, run, settings, wait_for
from tests.tiny_dense import make_tiny_dense
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow

NODE_START_S = 120.0
_OBJECT_STORE_BYTES = str(80 * 2**20)


class Nodes:
    """A cluster of `ray start --block` processes, ended by their own ids."""

    def __init__(self, folder: Path) -> None:
        # Unix socket paths are short, so Ray's folder must be as well.
        self.temp = Path(tempfile.mkdtemp(prefix="em", dir="/tmp"))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_TMPDIR": str(self.temp),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def head(self) -> None:
        """The head: control plane and engine."""
        self._start("head", "--head", f"--port={self.port}", "--num-cpus=2", "--include-dashboard=false")

    def worker(self, zone: str) -> None:
        """A worker labelled with its zone; its one core is for the hosts."""
        self._start(zone, f"--address={self.address}", "--num-cpus=1", f"--labels=zone={zone}")

    def _start(self, name: str, *arguments: str) -> None:
        log = self._folder / f"ray-{name}.log"
        ports = [free_port() for _ in range(4)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("ray")),
                    "start",
                    *arguments,
                    "--block",
                    "--node-ip-address=127.0.0.1",
                    f"--object-store-memory={_OBJECT_STORE_BYTES}",
                    f"--node-manager-port={ports[0]}",
                    f"--object-manager-port={ports[1]}",
                    f"--metrics-export-port={ports[2]}",
                    f"--dashboard-agent-listen-port={ports[3]}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self._started.append(process)

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_for(up, NODE_START_S, f"Ray's node {name} to start")

    def stop(self) -> None:
        """End the workers before the head, each by its own process id and those of its children."""
        for process in reversed(self._started):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            _, left = psutil.wait_procs(family, timeout=5)
            for member in left:
                member.kill()
            process.wait(20)
        shutil.rmtree(self.temp, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        cluster.head()
        cluster.worker("a")
        cluster.worker("b")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    dense = make_tiny_dense(
        folder / "dense", num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024
    )
    return upcycle(dense, folder / "tiny", dtype="float32")


def test_hosts_on_two_nodes(nodes: Nodes, tiny_model: Path, tmp_path: Path) -> None:
    config = settings(
        tiny_model,
        free_port(),
        hosts=[
            {"name": "west", "threads": 1, "selector": {"zone": "a"}},
            {"name": "east", "threads": 1, "selector": {"zone": "b"}},
        ],
        ray={"address": nodes.address, "token_path": str(nodes.token)},
    )
    program = ServerProgram(tmp_path / "server", config, nodes.environment)
    try:
        program.wait_ready()
        status = _ask(nodes, program, tmp_path, "status", "--json")
        hosts = {host["host_id"]: host for host in json.loads(status.out)["hosts"]}
        assert set(hosts) == {"west-0", "east-0"}
        assert hosts["west-0"]["node_id"] != hosts["east-0"]["node_id"]
        # The engine shares a node with one host at most, so at least one is reached over TCP.
        assert all(host["tcp"] for host in hosts.values())
        assert any(_connected(host["pid"], host["tcp"]) for host in hosts.values())
        client = openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0, timeout=120)
        answer = client.completions.create(
            model="tiny", prompt="The river", max_tokens=12, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 12
        down = _ask(nodes, program, tmp_path, "down")
        assert down.process.returncode == 0, down.err
        assert program.wait() == 0, program.err
        pids = [host["pid"] for host in hosts.values()]
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, "the hosts to end")
        after = _ask(nodes, program, tmp_path, "status", "--config", str(program.config))
        assert after.process.returncode == 1 and "nothing is deployed" in after.err
    finally:
        program.kill()


def test_a_wrong_token_is_refused(nodes: Nodes, tiny_model: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    config = settings(tiny_model, free_port(), ray={"address": nodes.address, "token_path": str(token)})
    program = ServerProgram(tmp_path / "server", config, {"RAY_AUTH_TOKEN_PATH": str(token)})
    try:
        assert program.wait(120) == 1
        assert "Traceback" not in program.err and "token" in program.err
    finally:
        program.kill()


def _ask(nodes: Nodes, program: ServerProgram, folder: Path, command: str, *options: str) -> Program:
    name = "-".join((command, *(option.strip("-").replace("/", "") for option in options)))
    url = () if "--config" in options else ("--url", program.url)
    return run(folder / name[:60], command, *options, *url, environment=nodes.environment)


def _connected(pid: int, address: str) -> bool:
    """Whether somebody is connected to this address of the process."""
    port = int(address.rpartition(":")[2])
    return any(
        connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        for connection in psutil.Process(pid).net_connections("tcp")
    )
