"""`expertmesh down`: end a server, and see that nothing of it is left."""

from __future__ import annotations

import os
import signal
import time

import psutil
from rich.console import Console

from cluster.config import Config
from cluster.errors import ExpertmeshError
from cluster.ray_cluster import connected
from workloads import run_file
from workloads.take_down import take_down

# Serve lets running requests end for a few seconds before it stops the replica.
_GRACE_S = 60.0


def end(config: Config, url: str | None, console: Console) -> None:
    """End the server of this machine by its process id; on a joined cluster take the mesh down there."""
    if config.ray.address != "local":
        with connected(config.ray):
            take_down(config.ray.namespace)
        console.print(f"the mesh on {config.ray.address} is down", highlight=False)
        return
    run = run_file.the_one(url)
    children = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while run_file.alive(run):
        if time.monotonic() > deadline:
            raise ExpertmeshError(
                f"process {run.pid} did not end within {_GRACE_S:.0f} s", f"kill -9 {run.pid}"
            )
        time.sleep(0.1)
    # Ray's processes end with their parent; whatever did not is ended here, by its own id.
    _, left = psutil.wait_procs(children, timeout=10)
    for process in left:
        process.kill()
    console.print(f"{run.url} is down", highlight=False)
