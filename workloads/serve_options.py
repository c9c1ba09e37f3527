"""What Ray Serve is told of the HTTP server and of the router's replicas. Pure functions."""

from __future__ import annotations

from typing import Any

from cluster.config import Config
from workloads.deploy import ENGINE_CPUS, engine_environment

# Beyond the requests that a replica lets in, those that it refuses itself, in OpenAI's shape, and probes,
# which a full replica must still answer.
_SPARE_REQUESTS = 64
# The replica ends a request by itself; Serve's proxy only those that no replica has taken by then.
_SPARE_S = 5.0


def http_options(config: Config) -> dict[str, Any]:
    """Arguments of Serve's HTTPOptions."""
    server = config.server
    return {"host": server.host, "port": server.port, "request_timeout_s": server.request_timeout + _SPARE_S}


def replica_options(config: Config) -> dict[str, Any]:
    """Options of the router's deployment."""
    limit = config.server.max_queue
    return {
        "max_ongoing_requests": limit + _SPARE_REQUESTS,
        # These wait in Serve's proxy, for a replica that is starting or busy refusing; more get a plain 503.
        "max_queued_requests": limit,
        "ray_actor_options": {
            "num_cpus": ENGINE_CPUS,
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
