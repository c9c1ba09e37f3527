"""Run by `test_ray_node_provider`, connected to a cluster that starts nodes itself: argument 1 is its address."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.ray_node_provider import RayNodeProvider
from cluster.node_shape import NodeShape

_TIMEOUT_S = 60.0


@ray.remote(num_cpus=0)
class Resident:
    """As an expert host, which takes no CPU of Ray's."""

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


def zones() -> dict[str, str]:
    """Living workers with their zone."""
    return {
        node["NodeID"]: node["Labels"]["zone"]
        for node in ray.nodes()
        if node["Alive"] and "zone" in node["Labels"]
    }


def wait_for(what: str, seen: Callable[[], Any], expected: object, provider: RayNodeProvider) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while (value := seen()) != expected:
        assert time.monotonic() < deadline, f"{what}: {value} and not {expected}; {provider.describe()}"
        time.sleep(0.2)
    print(f"{what} after {_TIMEOUT_S - (deadline - time.monotonic()):.1f} s", flush=True)


def shape(count: int) -> dict[str, NodeShape]:
    return {"cpu": NodeShape(count, 1, labels={"zone": "b"})}


def main() -> None:
    ray.init(address=sys.argv[1], namespace="autoscaled", log_to_driver=False, logging_level="error")
    provider = RayNodeProvider()
    provider.request(shape(2))
    wait_for("two nodes with the label", lambda: sorted(zones().values()), ["b", "b"], provider)
    assert provider.describe() == "Ray's autoscaler is asked for 2 × (1 CPU where zone: b)"

    actor: Any = Resident
    resident = actor.options(label_selector={"zone": "b"}).remote()
    home = ray.get(resident.node_id.remote())
    provider.request(shape(1))
    wait_for("the idle node is gone", lambda: list(zones()), [home], provider)

    provider.request(shape(5))
    wait_for("as many as there may be", lambda: len(zones()), 3, provider)
    wait_for(
        "what cannot be is said", lambda: "no node type has room for" in provider.describe(), True, provider
    )
    print(provider.describe())

    # Were it idle for Ray, it would be so for the longest time, and be the first to go.
    provider.request({})
    wait_for("only the node with an actor stays", lambda: list(zones()), [home], provider)
    ray.kill(resident)
    wait_for("nobody stays", zones, {}, provider)


if __name__ == "__main__":
    main()
