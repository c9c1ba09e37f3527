"""What Serve is told agrees with the configuration, and leaves room for what replicas refuse themselves."""

from __future__ import annotations

import pytest

from cluster.config import Config
from workloads.serve_options import http_options, replica_options

# Ray Serve's own, when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CONFIG = Config.model_validate({"server": {"port": 8123, "max_queue": 7, "request_timeout": "3s"}})


def test_serve_s_proxy_waits_a_little_longer_than_a_replica() -> None:
    from ray.serve.config import HTTPOptions

    options = HTTPOptions(**http_options(CONFIG))
    assert (options.host, options.port) == ("127.0.0.1", 8123)
    assert options.request_timeout_s is not None and 3 < options.request_timeout_s < 10


def test_a_replica_gets_more_than_it_lets_in_and_the_queue_has_an_end() -> None:
    options = replica_options(CONFIG)
    assert options["max_ongoing_requests"] > 7
    assert options["max_queued_requests"] == 7
    assert options["ray_actor_options"]["runtime_env"]["env_vars"]["OMP_WAIT_POLICY"] == "PASSIVE"


def test_serve_knows_every_option() -> None:
    from ray import serve

    made = serve.deployment(object, name="router", num_replicas=2, **replica_options(CONFIG))
    assert made.max_queued_requests == 7
