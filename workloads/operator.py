"""`expertmesh operator`: brings pods to meshes on KubeRay and takes them away again, drained."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer

from cluster.errors import ExpertmeshError

_ADMIN_PORT: Final = 8081


def operator(
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="Of the meshes (default: the context's, or the pod's)."),
    ] = None,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Default: the pod's service account, else as kubectl.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig.")] = None,
    service: Annotated[
        str | None, typer.Option(help="One RayService (default: all with expert hosts).")
    ] = None,
    admin_key: Annotated[
        str, typer.Option(envvar="EXPERTMESH_ADMIN_KEY", help="One of the meshes' admin.keys.")
    ] = "",
    admin_url: Annotated[
        str, typer.Option(help="Admin API; {ip}, {cluster} and {namespace} are filled in.")
    ] = f"http://{{ip}}:{_ADMIN_PORT}",
    lease: Annotated[
        str, typer.Option(help="Name of the Lease that decides who acts.")
    ] = "expertmesh-operator",
    watch_nodes: Annotated[
        bool, typer.Option(help="Watch nodes; off where the operator may not read them.")
    ] = True,
    period: Annotated[float, typer.Option(help="Seconds between looks at the meshes.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Bring pods to meshes on KubeRay, empty those that will not stay, and show how meshes are."""
    from cluster.admin_client import HttpMeshAdmin
    from cluster.kube import connect
    from cluster.kube_loop import Operator
    from cluster.kube_objects import Cluster
    from cluster.leader import Leader
    from workloads.logs import configure

    configure(log_level)
    api = connect(kubeconfig, context, namespace)
    meshes: dict[str, HttpMeshAdmin] = {}

    def mesh_of(cluster: Cluster) -> HttpMeshAdmin:
        url = address(admin_url, cluster.name, cluster.head_ip or cluster.head_service, api.namespace)
        if url not in meshes:
            meshes[url] = HttpMeshAdmin(url, admin_key)
        return meshes[url]

    leader = Leader(
        api, lease, f"{os.environ.get('HOSTNAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    )
    running = Operator(api, leader, mesh_of, service=service, watch_nodes=watch_nodes, period_s=period)
    if once:
        running.run_once()
        return
    _until_told(running.stop)
    running.run()


def address(template: str, cluster: str, ip: str, namespace: str) -> str:
    """Where a cluster's admin API is. ExpertmeshError for what the template can't mean."""
    try:
        return template.format(ip=f"[{ip}]" if ":" in ip else ip, cluster=cluster, namespace=namespace)
    except (KeyError, IndexError, ValueError) as error:
        raise ExpertmeshError(
            f"--admin-url {template} can't be filled in: {error!r}",
            "use {ip}, {cluster} and {namespace} only",
        ) from error


def _until_told(stop: Callable[[], None]) -> None:
    """A pod that is to end lets go of the lease first."""

    def told(_signal: int, _frame: FrameType | None) -> None:
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
