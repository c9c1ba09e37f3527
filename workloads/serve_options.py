"""What Ray Serve is told of the router's replicas. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.config import Config
from workloads.deploy import engine_environment
from workloads.engine_resources import ENGINE_CPUS


def replica_options(config: Config, selector: Mapping[str, str]) -> dict[str, Any]:
    """Options of the router's deployment, whose replicas run on nodes that match `selector`."""
    return {
        "ray_actor_options": {
            "num_cpus": ENGINE_CPUS,
            "num_gpus": float(sum(config.engine.gpu_shares)),
            "label_selector": dict(selector),
            "runtime_env": {"env_vars": engine_environment(config)},
        },
        # Requests are drained by `take_down`; what Serve itself would wait for is over by then.
        "graceful_shutdown_timeout_s": 5.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        # Three failures in a row mean a dead engine; Serve then starts another replica.
        "health_check_period_s": 2.0,
        # An engine that can't start won't start the next time either; every attempt takes a minute.
        "max_constructor_retry_count": 1,
    }
