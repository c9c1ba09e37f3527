"""Taking a mesh down: requests are given a moment, then application, hosts and controller end."""

from __future__ import annotations

import contextlib

APP = "expertmesh"
"""Name of the Ray Serve application."""
GRACE_S = 5.0
"""How long running requests may go on."""
ENGINE_END_S = 15.0
"""How long an engine may take to end after that; killed before, it would leave semaphores in /dev/shm."""


def take_down(namespace: str) -> None:
    """End the application, the hosts and the controller on the connected cluster."""
    import ray
    from ray import serve

    from actors import ray_controller

    # Serve would wait for open streams and then kill the engine in the middle; the routers end it themselves.
    with contextlib.suppress(Exception):
        if serve.status().applications[APP].status == "RUNNING":
            handle = serve.get_deployment_handle("router", APP)
            handle.broadcast("drain", GRACE_S).results(timeout_s=GRACE_S + ENGINE_END_S)
    with contextlib.suppress(Exception):
        serve.shutdown()
    controller = ray_controller.find(namespace)
    if controller is not None:
        with contextlib.suppress(Exception):
            ray.get(controller.stop.remote(), timeout=60)
        ray.kill(controller, no_restart=True)
