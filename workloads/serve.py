"""`expertmesh serve`: bring everything up, report, wait, and take everything down.

1. the model: made or found, its headers read, the architecture checked
2. Ray: a cluster of our own, or the one that the configuration names
3. the plan: who holds which experts, refused here if it does not fit
4. the controller starts the hosts; they load while Serve comes up
5. the table is published, the router's engine starts and connects
6. ready: every host answers and a token flows
7. on Ctrl-C or SIGTERM everything that was started is ended
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.checkpoint import Checkpoint
from cluster.config import Config, RayConfig
from cluster.errors import ConfigError, ExpertmeshError, HostError
from cluster.ray_cluster import connected, here, nodes
from workloads import run_file
from workloads.deploy import (
    Blueprint,
    blueprint,
    check_supported,
    choose_dtype,
    served_name,
)
from workloads.mesh_application import START_TIMEOUT_S, mesh_application
from workloads.models.default_model import default_model
from workloads.models.provenance import read_provenance
from workloads.rehearse import rehearse
from workloads.take_down import APP, take_down
from workloads.version_store import first_version

Progress = Callable[[str, float], None]

_POLL_S = 0.2


@dataclass
class Breakdown:
    """How long each stage of the start took, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin

    @property
    def total(self) -> float:
        """Seconds from the start until the server was ready."""
        return (self.ended or time.monotonic()) - self.started


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    served_name: str
    blueprint: Blueprint
    breakdown: Breakdown
    admin_url: str = ""
    """Of the admin API; "" for none."""


def open_model(config: Config, progress: Progress) -> tuple[Checkpoint, str, str]:
    """The checkpoint to serve, its dtype and its name; the default model is made on first use."""
    path = (
        default_model(progress=progress)
        if config.model.path == "default"
        else Path(config.model.path).expanduser()
    )
    # Hosts and engines have working directories of their own. A link keeps its name: only `..` must be
    # followed, since it leads elsewhere from behind a link.
    path = path.resolve() if ".." in path.parts else path.absolute()
    checkpoint, provenance = Checkpoint.open(path), read_provenance(path)
    return (
        checkpoint,
        choose_dtype(config, checkpoint, provenance.dtype if provenance else None),
        served_name(config, path),
    )


@contextlib.contextmanager
def serving(config: Config, progress: Progress) -> Iterator[Server]:
    """A ready server for the length of the block; everything it started ends with the block.

    Raises an ExpertmeshError that names what is wrong; then nothing is left running either.
    """
    breakdown = Breakdown()
    check_ports(config)
    with breakdown.stage("model"):
        checkpoint, dtype, name = open_model(config, progress)
        check_supported(checkpoint)
        versions = first_version(config, checkpoint)
    with breakdown.stage("compile"):
        rehearse(config, checkpoint, dtype, name, progress)
    breakdown.started = time.monotonic()
    with contextlib.ExitStack() as stack:
        with breakdown.stage("ray"):
            progress("starting Ray", 0.0)
            address = stack.enter_context(connected(config.ray))
            progress("starting Ray", 1.0)
        with breakdown.stage("plan"):
            print_ = blueprint(config, checkpoint, dtype, name, nodes(), here(), versions)
        url = f"http://{_url_host(config, print_)}:{config.server.port}"
        controller = _claim(config.ray, print_, stack)
        _bring_up(config, print_, controller, breakdown, progress)
        wait_ready(url, breakdown, progress)
        breakdown.ended = time.monotonic()
        stack.enter_context(_announced(config, url, name, address))
        yield Server(url, name, print_, breakdown, _admin_url(config))


def check_ports(config: Config) -> None:
    """ConfigError if somebody listens already where the server, or the admin API, is to listen."""
    check_port(config.server.host, config.server.port)
    if config.admin.port is not None:
        check_port(config.admin.host, config.admin.port, "admin.port", "set another in admin.port")


def check_port(
    host: str, port: int, key: str = "server.port", another: str = "choose another with --port"
) -> None:
    """ConfigError if somebody listens there already; `key` is what the configuration calls it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{key} {port} on {host} can't be used: {error.strerror}",
                f"{another}, or end what listens there (`expertmesh down` if it is expertmesh)",
            ) from error


def _claim(config: RayConfig, print_: Blueprint, stack: contextlib.ExitStack) -> Any:
    """The controller, told to start the hosts. HostError if another server has this cluster's namespace."""
    from actors import ray_controller

    controller = ray_controller.get_or_start(config.namespace, config.controller_selector)
    running = _get(controller.deployment.remote())
    if running is not None:
        # Before the take-down is registered: what runs there is not ours to end.
        raise HostError(
            f"{running.served_name} is deployed on this cluster already",
            "end it with `expertmesh down` first, or choose another ray.namespace",
        )
    stack.callback(take_down, config.namespace)
    _get(controller.deploy.remote(print_.deployment))
    return controller


def _bring_up(
    config: Config, print_: Blueprint, controller: Any, breakdown: Breakdown, progress: Progress
) -> None:
    from ray import serve
    from ray.serve.config import ProxyLocation

    with breakdown.stage("serve"):
        serve.start(proxy_location=ProxyLocation.Disabled)
    with breakdown.stage("engine and hosts"):
        application = mesh_application(config, print_)
        target = serve.RunTarget(application, name=APP, route_prefix=None)
        serve.run_many(
            [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
        _watch(serve, controller, progress)


def _watch(serve: Any, controller: Any, progress: Progress) -> None:
    """Show hosts and engine coming up until the application runs; what fails is raised."""
    deadline = time.monotonic() + START_TIMEOUT_S
    loading = True
    while True:
        if loading:
            states = _get(controller.progress.remote())
            failed = [state for state in states if state.error]
            if failed:
                raise HostError(f"expert host {failed[0].host_id} could not load: {failed[0].error}")
            done, total = sum(s.layers_loaded for s in states), sum(s.layers for s in states)
            progress("loading experts", done / max(total, 1))
            loading = not all(state.ready for state in states)
        progress("starting the engine", 0.5)
        application = serve.status().applications.get(APP)
        status = application.status if application else "NOT_STARTED"
        if status == "RUNNING" and not loading:
            progress("starting the engine", 1.0)
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ExpertmeshError(
                f"the engine could not start: {_cause(application)}", "run again with --log-level info"
            )
        if time.monotonic() > deadline:
            raise ExpertmeshError(
                "the engine did not start in time", "see the logs under /tmp/ray/session_latest/logs"
            )
        time.sleep(_POLL_S)


def _cause(application: Any) -> str:
    """The last line of the traceback that Serve kept for the deployment: what the engine said."""
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line and ":" in line]
    return (told or lines or ["no reason given"])[-1]


def wait_ready(url: str, breakdown: Breakdown, progress: Progress) -> None:
    """Ask /ready until it says yes."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with breakdown.stage("first token"), httpx.Client(timeout=5) as client:
        while True:
            progress("first token", 0.5)
            try:
                answer = client.get(f"{url}/ready")
                if answer.status_code == 200:
                    progress("first token", 1.0)
                    return
                reason = answer.text
            except httpx.HTTPError as error:
                reason = str(error)
            if time.monotonic() > deadline:
                raise ExpertmeshError(f"the server did not become ready: {reason}")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _announced(config: Config, url: str, name: str, address: str) -> Iterator[None]:
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    run = run_file.Run(
        os.getpid(), psutil.Process().create_time(), url, name, address, config.ray.namespace, token
    )
    path = run_file.write(run)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts whatever runs."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _get(reference: Any) -> Any:
    """Ray's answer, or the ExpertmeshError that was raised over there."""
    import ray

    try:
        return ray.get(reference, timeout=START_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ExpertmeshError):
            raise error.cause from None
        raise


def _admin_url(config: Config) -> str:
    """Where it is reached from here: the controller runs on this node."""
    if config.admin.port is None:
        return ""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.admin.host, config.admin.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.admin.port}"


def _url_host(config: Config, print_: Blueprint) -> str:
    """Where the server is reached from here. ConfigError if it would listen on another machine's loopback."""
    host, node = config.server.host, print_.engine_nodes[0]
    remote = node.hostname != socket.gethostname()
    if host in ("0.0.0.0", "::"):
        return node.ip if remote else "127.0.0.1"
    if remote and (host == "localhost" or host.startswith("127.") or host == "::1"):
        raise ConfigError(
            f"server.host {host} is not reached from here: the engine runs on {node.hostname}",
            "start a node here with --num-cpus and the labels of engine.selector, or set server.host to an address "
            "and server.api_keys",
        )
    return f"[{host}]" if ":" in host else host
