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
    assert made.ray_actor_options["num_gpus"] == 0
    assert made.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        ({"gpus": 0.4}, 0.4),
        ({}, 1),
        ({"options": {"tensor_parallel_size": 2}}, 2),
        ({"options": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}, 4),
    ],
)
def test_serve_gives_an_engine_its_share_of_a_gpu(engine: dict[str, object], gpus: float) -> None:
    config = Config.model_validate({"engine": {"device": "cuda", **engine}})
    assert replica_options(config, {})["ray_actor_options"]["num_gpus"] == gpus
