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
# Longer than Ray's autoscaler takes to say what is impossible; the mesh's looks once in 15 s.
_LOOK_S = 3.0


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
    asked = "Ray's autoscaler is asked for 2 × (1 CPU where zone: b)"
    wait_for("nothing more is said", provider.describe, asked, provider)

    actor: Any = Resident
    resident = actor.options(label_selector={"zone": "b"}).remote()
    home = ray.get(resident.node_id.remote())
    # At rest: the node with the actor is in use.
    provider.request({})
    wait_for("the idle node is gone", lambda: list(zones()), [home], provider)

    # Of more than there may be Ray would start none.
    def as_many_as_may_be() -> int:
        provider.request(shape(5))
        time.sleep(_LOOK_S)
        return len(zones())

    wait_for("as many as there may be", as_many_as_may_be, 3, provider)
    assert "2 more are not possible: no node type fits, or all are at their limit" in provider.describe()

    # Were the one with the actor idle for Ray, it would be so for the longest time, and be the first to go.
    provider.request({})
    wait_for("only the node with an actor stays", lambda: list(zones()), [home], provider)
    ray.kill(resident)
    wait_for("nobody stays", zones, {}, provider)


if __name__ == "__main__":
    main()
