"""Ray grants what hosts and engine take of GPUs, on a node that is said to have two."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.ray_hosts import RayHost, RayHosts
from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.ray_cluster import nodes
from cluster.repair_state import HostReady
from tests.tiny_models import make_tiny
from workloads.deploy import blueprint
from workloads.serve_options import replica_options

# Hosts that load nothing need no GPU.
CONFIG = Config.model_validate(
    {
        "engine": {"device": "cuda", "gpus": 0.4},
        "hosts": [
            {"count": 2, "device": "cuda", "gpus": 0.3, "threads": 1, "kernel": "noop", "memory": "64MiB"}
        ],
        "data_plane": {"tcp": "never"},
    }
)
TIMEOUT_S = 60.0


class Taker:
    """Something that has a share of a GPU, in place of an engine."""

    def gpus(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture
def end() -> Iterator[ExitStack]:
    """Ends what a test started."""
    with ExitStack() as stack:
        yield stack


def taker(end: ExitStack, gpus: float) -> Any:
    actor: Any = ray.remote(Taker).options(num_cpus=0, num_gpus=gpus).remote()
    end.callback(ray.kill, actor)
    return actor


def ready(host: RayHost) -> bool:
    return isinstance(host.probe(5), HostReady)


def test_two_hosts_and_an_engine_share_one_gpu(ray_cluster: str, tmp_path: Path, end: ExitStack) -> None:
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path / "tiny"))
    made = blueprint(CONFIG, checkpoint, "float32", "tiny", nodes())
    hosts = RayHosts(f"gpus-{secrets.token_hex(4)}")
    launched = [hosts.launch(spec, 1) for spec in made.deployment.hosts]
    for host in launched:
        end.callback(host.stop)
    deadline = time.monotonic() + TIMEOUT_S
    while not all(map(ready, launched)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(ready, launched))

    engine = taker(end, replica_options(CONFIG, {})["ray_actor_options"]["num_gpus"])
    # Nobody has anything of the other one.
    other = taker(end, 1)
    assert ray.get([engine.gpus.remote(), other.gpus.remote()], timeout=TIMEOUT_S) == ["0", "1"]
    late = taker(end, 0.1)
    assert not ray.wait([late.gpus.remote()], timeout=0.5)[0]
