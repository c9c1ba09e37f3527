"""Start or join a Ray cluster, always with token authentication. Ray is imported inside the functions:
its environment must be set before, and the rest of `cluster` needs no Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster import niceness
from cluster.auth import ensure_token, ray_environment, token_path
from cluster.config import RayConfig
from cluster.errors import ConfigError, ExpertmeshError
from cluster.inventory import nodes_from_ray
from cluster.messages import NodeInfo

# Nothing large goes through Ray's object store here; the smallest that Ray takes.
_OBJECT_STORE_BYTES = 80 * 2**20
_WORKERS_END_S = 5.0
_KNOCK_S = 5.0


# Less often than Ray's defaults (0.1 s, 0.1 s and 0.1 s), and none of Ray's own metrics: the router has its own.
QUIET = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "RAY_enable_metrics_collection": "false",
}


@contextlib.contextmanager
def connected(settings: RayConfig, *, quiet: bool = True) -> Iterator[str]:
    """A connection to the cluster that `settings` names, its address as the value.

    `local` starts a cluster of this process's own, which ends with the block. ConfigError if there is no
    cluster at the address, or its token is another one.
    """
    token = token_path(settings.token_path)
    ensure_token(token)
    wanted = ray_environment(token)
    # Ray reads how to authenticate when it is imported; set later, every call would be refused.
    assert "ray" not in sys.modules or wanted.items() <= os.environ.items(), "Ray was imported too early"
    os.environ.update(wanted)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray makes its workers nice by default, so that on a busy machine tokens would wait for everything else.
    os.environ.setdefault(niceness.RAY_VARIABLE, niceness.of_workers())
    if quiet:
        # Where a node dies Ray prints the raylet's log on standard output, whoever is asked for JSON there.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if settings.address == "local":
        # Ray's housekeeping shares the cores of the experts, whose threads wait for the slowest of them.
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    import ray

    common: dict[str, Any] = {
        "namespace": settings.namespace,
        "log_to_driver": not quiet,
        "logging_level": "error",
    }
    before = {process.pid for process in psutil.Process().children()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if ":" in settings.address:
            _knock(settings.address)
        if settings.address == "local":
            context: Any = ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **common,
            )
        else:
            context = ray.init(address=settings.address, **common)
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {settings.address}",
            "start one with `ray start --head`, or set ray.address to local",
        ) from error
    except Exception as error:
        if "token" in str(error).lower():
            raise ConfigError(
                f"the Ray cluster at {settings.address} does not accept this token ({token})",
                "use the head node's token file, with RAY_AUTH_MODE=token on every node",
            ) from error
        # Ray gives its own processes 30 seconds, which a machine under load may not keep to.
        raise ExpertmeshError(
            f"Ray did not start: {str(error).strip().splitlines()[0]}",
            "try again when the machine is less busy; the logs are under /tmp/ray/session_latest/logs",
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray puts handlers of its own in their place, of which the one for SIGTERM ends the process at once:
        # `expertmesh down` would leave the mesh behind.
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
    # A program may have children of its own.
    ours = [process for process in psutil.Process().children() if process.pid not in before]
    try:
        yield str(context.address_info["address"])
    finally:
        if settings.address == "local":
            _end_local_cluster(ours)
        else:
            ray.shutdown()


def _knock(address: str) -> None:
    """OSError unless somebody listens at ``ip:port``: Ray itself would go on trying for minutes."""
    import socket

    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


def _end_local_cluster(daemons: Sequence[psutil.Process]) -> None:
    """End the cluster that this process started with these, and wait until none of its processes is left."""
    import ray

    # Ray waits for its daemons only; the workers end by themselves a moment later.
    ours = list(daemons)
    for process in daemons:
        with contextlib.suppress(psutil.NoSuchProcess):
            ours += process.children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(ours, timeout=_WORKERS_END_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_WORKERS_END_S)


def nodes() -> tuple[NodeInfo, ...]:
    """The living nodes of the connected cluster."""
    import ray

    return nodes_from_ray(ray.nodes())


def here() -> str:
    """Id of the node that this process is connected to; it runs on the same machine."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def local_node() -> NodeInfo:
    """This machine as the only node, without starting Ray: what `plan` needs."""
    import socket

    import psutil

    return NodeInfo(
        node_id="local",
        ip="127.0.0.1",
        hostname=socket.gethostname(),
        cpus=float(len(os.sched_getaffinity(0))),
        gpus=float(_gpus()),
        memory_bytes=psutil.virtual_memory().available,
    )


def _gpus() -> int:
    """NVIDIA GPUs of this machine that a Ray node on it would have."""
    there = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([gpu for gpu in visible.split(",") if gpu]))
