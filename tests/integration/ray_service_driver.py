"""Hands Ray Serve a RayService's `serveConfigV2`, as the dashboard does for KubeRay, and prints how it went as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

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
        print(json.dumps({"status": application.status, "message": application.message}))


if __name__ == "__main__":
    main(*sys.argv[1:])
