"""Expert hosts as Ray actors: the edge between plain `ExpertHost` and Ray.

The actors are detached and named, so they outlive whoever started them and a restarted controller
finds them again; Ray restarts a host that dies, with the same specification.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import failpoints, openmp
from cluster.auth import data_plane_key
from cluster.compute_environment import compute_environment
from cluster.messages import HostAddress, HostProgress, HostReport, HostSpec

_PREFIX = "host:"


# Ray's types know no max_concurrency. Threads, so that progress answers while wait_ready waits.
_actor: Any = ray.remote(max_restarts=-1, max_task_retries=0, max_concurrency=4, num_cpus=0)  # type: ignore[call-overload]


@_actor
class HostActor:
    """Ray's view of an ExpertHost. Loading starts at once; `wait_ready` tells when it is done."""

    def __init__(self, spec: HostSpec) -> None:
        openmp.load()
        # Only the host itself needs torch; the controller and the command line use this module too.
        from actors.expert_host import ExpertHost

        self._host = ExpertHost(spec, data_plane_key())
        self._host.start()

    def progress(self) -> HostProgress:
        return self._host.progress()

    def wait_ready(self, timeout_s: float) -> HostAddress:
        return self._host.wait_ready(timeout_s)

    def report(self) -> HostReport:
        return self._host.report()

    def failpoint(self, name: str, value: float) -> None:
        self._host.failpoint(name, value)


class RayHost:
    """A handle on one host actor with blocking calls."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def progress(self, timeout_s: float) -> HostProgress:
        return ray.get(self._actor.progress.remote(), timeout=timeout_s)

    def wait_ready(self, timeout_s: float) -> HostAddress:
        return ray.get(self._actor.wait_ready.remote(timeout_s), timeout=timeout_s + 10)

    def report(self, timeout_s: float) -> HostReport:
        return ray.get(self._actor.report.remote(), timeout=timeout_s)

    def failpoint(self, name: str, value: float, timeout_s: float) -> None:
        ray.get(self._actor.failpoint.remote(name, value), timeout=timeout_s)

    def stop(self) -> None:
        ray.kill(self._actor, no_restart=True)


class RayHosts:
    """Launches and finds host actors in one Ray namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def launch(self, spec: HostSpec) -> RayHost:
        """Start the host on the node that the plan chose."""
        allowed_faults = {failpoints.VARIABLE: "1"} if failpoints.enabled(os.environ) else {}
        options = {
            "name": _PREFIX + spec.host_id,
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_gpus": 1 if spec.device == "cuda" else 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(spec.node_id, soft=False),
            "runtime_env": {"env_vars": {**compute_environment(spec.threads), **allowed_faults}},
        }
        actor: Any = HostActor
        return RayHost(actor.options(**options).remote(spec))

    def find(self, host_id: str) -> RayHost | None:
        """A running host of that name, or None."""
        try:
            return RayHost(ray.get_actor(_PREFIX + host_id, namespace=self._namespace))
        except ValueError:
            return None
