"""What a RayService's application decides before it starts anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import Checkpoint
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.messages import NodeInfo
from tests.tiny_models import make_tiny
from workloads.deploy import blueprint
from workloads.ray_service import differing, lacking, read_arguments, wait_for_nodes

GIB = 2**30
GROUPS: dict[str, Any] = {
    "engine": {"selector": {"role": "router"}, "kv_cache": "64MiB"},
    "hosts": [
        {"name": "big", "count": 2, "selector": {"group": "big"}},
        {"name": "every", "count": "per_node", "selector": {"group": "every"}},
    ],
}


def node(number: int, cpus: float = 2, **labels: str) -> NodeInfo:
    return NodeInfo(f"n{number}", f"10.0.0.{number}", f"pod{number}", cpus, 0, 4 * GIB, labels)


ROUTER, BIG, SECOND, EVERY = (
    node(1, role="router"),
    node(2, group="big"),
    node(3, group="big"),
    node(4, group="every"),
)


def test_a_node_for_every_host_and_one_for_engines() -> None:
    config = Config.model_validate(GROUPS)
    assert lacking(config, ()) == {"big": 2, "every": 1, "the engine": 1}
    assert lacking(config, (ROUTER, BIG, EVERY)) == {"big": 1}
    assert lacking(config, (ROUTER, BIG, SECOND, EVERY)) == {}
    # A head that was started with no CPUs is none of them.
    assert lacking(Config.model_validate({}), (node(0, cpus=0),)) == {"local": 1, "the engine": 1}


class Time:
    """A clock that goes on with every sleep."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_it_waits_until_nodes_have_joined() -> None:
    time = Time()
    joined = {0: (ROUTER,), 5: (ROUTER, BIG), 9: (ROUTER, BIG, SECOND, EVERY)}

    def nodes() -> tuple[NodeInfo, ...]:
        return next(there for since, there in reversed(joined.items()) if time.now >= since)

    wait_for_nodes(Config.model_validate(GROUPS), nodes, 300, clock=time.clock, sleep=time.sleep)
    assert time.now == 9


def test_it_goes_on_with_fewer_nodes_when_time_is_over() -> None:
    time = Time()
    wait_for_nodes(
        Config.model_validate(GROUPS), lambda: (ROUTER, BIG), 30, clock=time.clock, sleep=time.sleep
    )
    assert 30 < time.now <= 32


def test_what_serve_says_is_checked() -> None:
    assert read_arguments({"config": "/etc/x.yaml"}).config == Path("/etc/x.yaml")
    with pytest.raises(ConfigError, match="confg: Extra inputs"):
        read_arguments({"config": "/etc/x.yaml", "confg": 1})


def test_the_same_deployment_is_kept_and_another_one_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path / "mixtral"))
    nodes = (ROUTER, BIG, SECOND, EVERY)

    def made(**changes: Any) -> Any:
        config = Config.model_validate({**GROUPS, **changes})
        return blueprint(config, checkpoint, "float32", "tiny", nodes).deployment

    one = made()
    assert one.run != made().run and differing(one, made()) == []
    assert differing(one, made(placement={"replicas": 2})) == ["placement"]
    assert differing(one, replace(one, served_name="other")) == ["model"]
    assert differing(one, made(hosts=[GROUPS["hosts"][0]])) == ["hosts"]
    assert differing(one, replace(one, nodes="operator")) == ["ray.nodes"]
