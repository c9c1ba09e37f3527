"""The mesh as an application that Ray Serve builds by name: what KubeRay's RayService runs.

    import_path: workloads.ray_service:application
    args: {config: /etc/expertmesh/expertmesh.yaml}

Nobody waits beside it as `expertmesh serve` does, and the cluster is another's: pods join while this runs, Serve
starts, watches and ends the engines, and the mesh ends with its cluster. Serve calls this again when it deploys
anew; a mesh that is deployed already is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config import Config, load_config
from cluster.deployment import Deployment
from cluster.errors import ConfigError, HostError
from cluster.inventory import matches
from cluster.messages import NodeInfo
from workloads.deploy import blueprint, check_supported
from workloads.mesh_application import START_TIMEOUT_S, mesh_application
from workloads.serve import open_model
from workloads.version_store import first_version

_POLL_S: Final = 1.0

log = structlog.get_logger()


class Arguments(BaseModel):
    """What `serveConfigV2` says in `args`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path
    """The configuration's file, the same on every node."""
    nodes_timeout_s: float = 300.0
    """How long to wait for a node per host, before hosts are laid onto those that are there."""


def application(args: dict[str, Any]) -> Any:
    """The router's application, after controller and hosts were started on the cluster that this is called in.

    Serve shows the ExpertmeshError of what can't be in the application's message.
    """
    from cluster.ray_cluster import here, nodes

    arguments = read_arguments(args)
    config = load_config(arguments.config, {}, os.environ).config
    checkpoint, dtype, name = open_model(config, lambda what, share: log.info(what, share=round(share, 2)))
    check_supported(checkpoint)
    versions = first_version(config, checkpoint)
    wait_for_nodes(config, nodes, arguments.nodes_timeout_s)
    print_ = blueprint(config, checkpoint, dtype, name, nodes(), here(), versions)
    _deploy(config, print_.deployment)
    return mesh_application(config, print_)


def read_arguments(args: Mapping[str, Any]) -> Arguments:
    """ConfigError that names what is wrong."""
    try:
        return Arguments.model_validate(args)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(
            f"args of the application in serveConfigV2: {wrong}",
            "give args: {config: /etc/expertmesh/expertmesh.yaml}",
        ) from None


def lacking(config: Config, nodes: Sequence[NodeInfo]) -> Mapping[str, int]:
    """How many nodes each part of the mesh lacks for one host a node, and for any engine at all; empty if none."""
    wanted = {
        group.name: (1 if group.count == "per_node" else group.count, group.selector)
        for group in config.hosts
    }
    # Group names can't have a space.
    wanted["the engine"] = (1, config.engine.selector)
    found = {
        name: count - sum(node.cpus >= 1 and matches(selector, node.labels) for node in nodes)
        for name, (count, selector) in wanted.items()
    }
    return {name: count for name, count in found.items() if count > 0}


def wait_for_nodes(
    config: Config,
    nodes: Callable[[], Sequence[NodeInfo]],
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until there is a node for every host and engine, or until time is over.

    Serve is told to build the application as soon as the head is there. Laid out then, the hosts of a group would
    share the first of its nodes that came.
    """
    deadline, told = clock() + timeout_s, None
    while lack := lacking(config, nodes()):
        if clock() > deadline:
            log.warning("not every host has a node of its own", lacking=dict(lack))
            return
        if lack != told:
            log.info("waiting for nodes", lacking=dict(lack))
            told = lack
        sleep(_POLL_S)


def _deploy(config: Config, deployment: Deployment) -> None:
    """Have the controller start the hosts, unless it has. HostError if what runs there is something else."""
    import ray

    from actors import ray_controller

    controller = ray_controller.get_or_start(config.ray.namespace, config.ray.controller_selector)
    running = ray.get(controller.deployment.remote(), timeout=START_TIMEOUT_S)
    if running is None:
        ray.get(controller.deploy.remote(deployment), timeout=START_TIMEOUT_S)
    elif different := differing(running, deployment):
        raise HostError(
            f"{running.served_name} is deployed on this cluster with another {', '.join(different)}",
            "upgrade through a new cluster, as RayService does when its rayClusterConfig changes",
        )


def differing(running: Deployment, wanted: Deployment) -> list[str]:
    """What of a deployment that runs is not what is wanted: nothing of it can be changed by deploying again."""
    parts: Mapping[str, Callable[[Deployment], object]] = {
        "model": lambda d: (d.served_name, d.layers, d.item_bytes, {spec.model for spec in d.hosts}),
        "hosts": lambda d: d.groups,
        "placement": lambda d: d.placement,
        "store of versions": lambda d: (d.store, d.version_settings),
        "admin API": lambda d: d.admin,
        "ray.nodes": lambda d: d.nodes,
    }
    return [name for name, of in parts.items() if of(running) != of(wanted)]
