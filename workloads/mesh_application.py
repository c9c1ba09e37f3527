"""The router's Serve application for a deployed mesh: what `expertmesh serve` runs and a RayService is given."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from cluster.config import Config
from workloads.deploy import Blueprint, router_spec
from workloads.serve_options import replica_options

START_TIMEOUT_S: Final = 900.0
"""How long hosts and engines may take to start."""


def mesh_application(config: Config, print_: Blueprint) -> Any:
    """The application; its replicas ask the controller of this namespace for their tables."""
    from actors import ray_controller
    from actors.router_deployment import serve_application

    namespace, (first, *_) = config.ray.namespace, print_.engine_nodes
    return serve_application(
        router_spec(config, print_),
        partial(ray_controller.published_table, namespace, START_TIMEOUT_S),
        partial(ray_controller.next_table, namespace),
        partial(ray_controller.report_traffic, namespace),
        partial(ray_controller.experts_json, namespace),
        partial(ray_controller.observe, namespace),
        replicas=config.engine.replicas,
        options=replica_options(config, config.engine.selector or {"ray.io/node-id": first.node_id}),
    )
