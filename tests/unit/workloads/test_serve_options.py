"""What Serve is told agrees with the configuration."""

from __future__ import annotations

import pytest

from cluster.config import Config
from workloads.serve_options import replica_options

# Ray Serve's own, when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_serve_knows_every_option_and_starts_engines_on_the_chosen_node() -> None:
    from ray import serve

    options = replica_options(Config.model_validate({"engine": {"threads": 3}}), {"ray.io/node-id": "abc"})
    made = serve.deployment(object, name="router", num_replicas=2, **options)
    assert made.ray_actor_options["label_selector"] == {"ray.io/node-id": "abc"}
    assert made.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
