"""Several nodes: a head and two labelled workers on this machine, hosts on the workers, rows over TCP.

One of the workers does not see the model's folder: its processes have a mount namespace of their own, in which an
empty file system lies over it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.programs import Program, ServerProgram, free_port, run, settings, wait_for
from tests.tiny_dense import make_tiny_dense
from workloads.bench.ray_nodes import HEAD, RayNodes, Worker
from workloads.models.upcycle import upcycle

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Nodes:
    """A running cluster and its token's file."""

    ray: RayNodes
    token: Path

    @property
    def address(self) -> str:
        return self.ray.address

    @property
    def environment(self) -> dict[str, str]:
        return self.ray.environment


def hiding(folder: Path) -> list[str]:
    """What a command line begins with to see an empty folder there."""
    # Whoever is not root is so in a user namespace of its own.
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = 'mount -t tmpfs -o size=64k none "$0" && exec "$@"'
    return ["unshare", *user, "--mount", "sh", "-c", script, str(folder)]


def can_hide(folder: Path) -> bool:
    """Whether this machine lets us."""
    try:
        seen = subprocess.run([*hiding(folder), "ls", str(folder)], capture_output=True, timeout=30)
    except FileNotFoundError:
        return False
    return seen.returncode == 0 and seen.stdout == b""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Nodes]:
    token = tmp_path_factory.mktemp("nodes") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    before = tuple(hiding(tiny_model)) if can_hide(tiny_model) else ()
    cluster = RayNodes(token, [Worker("a"), Worker("b", before=before)], {"OMP_NUM_THREADS": "1"})
    try:
        cluster.start(head_cpus=2)
        yield Nodes(cluster, token)
    finally:
        cluster.close()


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
        # Where `serve` is: on a node of hosts it would be lost with them.
        wait_for(
            lambda: "ray::ControllerActor" in _titles(nodes), 10, "the controller to be seen on the head"
        )
        # The engine is on the head, so both are reached over TCP.
        assert all(_connected(host["pid"], host["tcp"]) for host in hosts.values())
        hidden = can_hide(tiny_model)
        assert hosts["west-0"]["copied_from"] == []
        assert hosts["east-0"]["copied_from"] == (["west-0"] if hidden else [])
        expected = greedy(tiny_model, "The river", 12)
        assert complete(program, "The river", 12) == expected

        os.kill(hosts["east-0"]["pid"], signal.SIGKILL)

        def repaired() -> dict | None:
            told = _ask(nodes, program, tmp_path / secrets.token_hex(4), "status", "--json")
            east = next(host for host in json.loads(told.out)["hosts"] if host["host_id"] == "east-0")
            return east if east["state"] == "ready" and east["launches"] == 2 else None

        hosts["east-0"] = wait_for(repaired, 60, "the host to be launched again")
        assert hosts["east-0"]["copied_from"] == (["west-0"] if hidden else [])
        wait_for(lambda: httpx.get(f"{program.url}/ready", timeout=30).status_code == 200, 30, "readiness")
        assert complete(program, "The river", 12) == expected

        # What is on a node goes to the others before it is drained.
        drained = _ask(nodes, program, tmp_path / "drain", "drain", hosts["east-0"]["node_id"])
        assert drained.process.returncode == 0, drained.err
        assert "is drained: east-0" in drained.out
        told = json.loads(_ask(nodes, program, tmp_path / "after", "status", "--json").out)
        (west,) = told["hosts"]
        assert west["host_id"] == "west-0" and west["experts_loaded"] > hosts["west-0"]["experts_loaded"]
        assert complete(program, "The river", 12) == expected
        refused = _ask(nodes, program, tmp_path / "refused", "drain", hosts["west-0"]["node_id"])
        assert refused.process.returncode == 1 and "can't be drained" in refused.err

        down = _ask(nodes, program, tmp_path, "down")
        assert down.process.returncode == 0, down.err
        assert program.wait() == 0, program.err
        pids = [host["pid"] for host in hosts.values()]
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, "the hosts to end")
        after = _ask(nodes, program, tmp_path, "status", "--config", str(program.config))
        assert after.process.returncode == 1 and "nothing is deployed" in after.err
    finally:
        program.kill()


def test_where_no_host_s_node_has_the_folder_the_start_ends_with_the_reason(
    nodes: Nodes, tiny_model: Path, tmp_path: Path
) -> None:
    if not can_hide(tiny_model):
        pytest.skip("this machine lets us have no mount namespace")
    config = settings(
        tiny_model,
        free_port(),
        hosts=[{"name": "east", "threads": 1, "selector": {"zone": "b"}}],
        ray={"address": nodes.address, "token_path": str(nodes.token)},
    )
    program = ServerProgram(tmp_path / "server", config, nodes.environment)
    try:
        assert program.wait(120) == 1
        told = " ".join(program.err.split())
        assert f"{tiny_model}/config.json is missing" in told
        assert "no other host is ready to give its experts" in told
        assert "put the model's folder there" in told and "Traceback" not in told
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


def _titles(nodes: Nodes) -> set[str]:
    """Of the head's processes; an actor's goes on with the method that it runs."""
    found = set()
    for process in nodes.ray.processes(HEAD):
        # One that ends meanwhile has no command line.
        with contextlib.suppress(psutil.Error, IndexError):
            found.add(process.cmdline()[0].partition(".")[0])
    return found


def _connected(pid: int, address: str) -> bool:
    """Whether somebody is connected to this address of the process."""
    port = int(address.rpartition(":")[2])
    return any(
        connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        for connection in psutil.Process(pid).net_connections("tcp")
    )


def complete(program: ServerProgram, prompt: str, tokens: int) -> str:
    client = openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0, timeout=120)
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == tokens
    return answer.choices[0].text


@torch.inference_mode()
def greedy(path: Path, prompt: str, tokens: int) -> str:
    """The same by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


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
