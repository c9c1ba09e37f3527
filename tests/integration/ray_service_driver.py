"""Hands Ray Serve a RayService's `serveConfigV2`, as the dashboard does for KubeRay, and prints how it went as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RayConfig
from cluster.ray_cluster import connected


def main(address: str, token: str, file: str, timeout_s: str) -> None:
    """`file` is the YAML. Ends when the application runs, failed to be deployed, or time is over."""
    with connected(RayConfig(address=address, token_path=token)):
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        config = ServeDeploySchema.model_validate(yaml.safe_load(Path(file).read_text("utf-8")))
        serve.start(proxy_location=config.proxy_location, http_options=config.http_options.model_dump())
        _get_global_client().deploy_apps(config)
        deadline = time.monotonic() + float(timeout_s)
        while True:
            (application,) = serve.status().applications.values()
            if application.status in ("RUNNING", "DEPLOY_FAILED") or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        messages = [application.message, *(one.message for one in application.deployments.values())]
        told = {"status": application.status, "message": "\n".join(messages), "hosts": _hosts()}
        print(json.dumps(told))


def _hosts() -> dict[str, dict[str, Any]]:
    """Of what is deployed: each host's experts and its node's labels, as the controller has them."""
    import ray

    from actors import ray_controller
    from cluster.ray_cluster import nodes

    controller = ray_controller.find(RayConfig().namespace)
    deployment = None if controller is None else ray.get(controller.deployment.remote(), timeout=60)
    labels = {node.node_id: dict(node.labels) for node in nodes()}
    return {
        spec.host_id: {
            "experts": {str(layer): list(held) for layer, held in spec.experts.items()},
            "group": labels[spec.node_id].get("expertmesh.io/group"),
            "threads": spec.threads,
            "node": spec.node_id,
        }
        for spec in (deployment.hosts if deployment is not None else ())
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
