"""Expert hosts as Ray actors: the edge between plain `ExpertHost` and Ray.

The actors are detached and named, so they outlive whoever started them and a restarted controller
finds them again. Ray restarts none of them: `cluster.repair` decides when, where and whether.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError, RayTaskError
from ray.experimental import internal_kv
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import failpoints, gentle_start, memory_guard, openmp
from cluster import niceness
from cluster.auth import data_plane_key
from cluster.compute_environment import compute_environment
from cluster.holdings import Holdings
from cluster.inventory import nodes_from_ray
from cluster.listening import Listening
from cluster.live_versions import Variants
from cluster.messages import HostProgress, HostReport, HostSpec, NodeInfo, Sources
from cluster.repair_state import HostDead, HostFailed, HostReady

_PREFIX = "host:"
# How Ray tells that a process was killed or crashed: its connection ended.
_LAST_WORDS: Final = b"expertmesh:last-words:"
_NO_WORD: Final = "connection error code 2. End of file"


# Ray's types know no max_concurrency. Threads, so that progress answers while a report waits.
_actor: Any = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4, num_cpus=0)  # type: ignore[call-overload]


@_actor
class HostActor:
    """Ray's view of an ExpertHost. Loading starts at once; `progress` tells when it is done."""

    def __init__(self, spec: HostSpec, sources: Callable[[str], Sources] | None = None) -> None:
        lowered = gentle_start.lower()
        if not lowered:
            niceness.usual()
        if spec.memory_limit_bytes:
            memory_guard.guard(spec.memory_limit_bytes, self._die)
        openmp.load()
        # Only the host itself needs torch; the controller and the command line use this module too.
        from actors.expert_host import ExpertHost

        self._host = ExpertHost(
            spec,
            data_plane_key(),
            gentle_start.restore if lowered else lambda: None,
            partial(sources, spec.host_id) if sources else None,
        )
        self._host.start()

    def progress(self) -> HostProgress:
        return self._host.progress()

    def report(self) -> HostReport:
        return self._host.report()

    def adopt(self, experts: Holdings, number: int, bandwidth: int, variants: Variants) -> None:
        self._host.adopt(experts, number, bandwidth, variants)

    def failpoint(self, name: str, value: float) -> None:
        self._host.failpoint(name, value)

    def _die(self, reason: str) -> None:
        # First of all: the kernel closes a dead process's sockets only after it has freed its memory, and freeing
        # gigabytes takes longer than the engines may wait.
        with contextlib.suppress(
            AttributeError, RuntimeError
        ):  # not there yet, or a connection came this moment
            self._host.close()
        _leave_word(reason)
        gentle_start.give_way()
        os._exit(1)


class RayHost:
    """A handle on one launch of a host, with blocking calls."""

    def __init__(self, actor: Any, host_id: str, generation: int) -> None:
        self._actor = actor
        self.host_id = host_id
        self.generation = generation
        self._ready: HostReady | None = None

    def progress(self, timeout_s: float) -> HostProgress:
        return ray.get(self._actor.progress.remote(), timeout=timeout_s)

    def report(self, timeout_s: float) -> HostReport:
        return ray.get(self._actor.report.remote(), timeout=timeout_s)

    def failpoint(self, name: str, value: float, timeout_s: float) -> None:
        ray.get(self._actor.failpoint.remote(name, value), timeout=timeout_s)

    def probe(self, timeout_s: float) -> HostReady | HostFailed | HostDead | None:
        """How it is; None while it loads or if it doesn't answer, which is not to be dead."""
        try:
            state = self.progress(timeout_s)
            if state.error:
                return HostFailed(self.host_id, self.generation, _first_line(state.error))
            if state.ready and self._ready is None:
                report = self.report(timeout_s)
                self._ready = HostReady(
                    self.host_id, self.generation, report.address, report.weight_bytes, cost=report.cost
                )
        except (ActorDiedError, ActorUnschedulableError) as error:
            reason = _last_words(self.host_id, self.generation) or cause_of_death(str(error))
            return HostDead(self.host_id, self.generation, reason)
        except (ActorUnavailableError, TimeoutError, RayTaskError):
            return None
        if self._ready is None or state.holds is None:
            return self._ready
        return replace(self._ready, holds=state.holds, weight_bytes=state.holds.weight_bytes)

    def adopt(self, experts: Holdings, number: int, bandwidth: int, variants: Variants) -> None:
        """Ask it to hold these experts; its answer is in what it says at the next probe."""
        self._actor.adopt.remote(experts, number, bandwidth, variants)

    def stop(self) -> None:
        ray.kill(self._actor, no_restart=True)


class RayHosts:
    """Launches and finds host actors in one Ray namespace.

    Each launch has a name of its own, since Ray keeps the name of one that dies for a moment.
    """

    def __init__(self, namespace: str, sources: Callable[[str], Sources] | None = None) -> None:
        """`sources` tells a host, by its id and in its process, where it may copy experts from."""
        self._namespace = namespace
        self._sources = sources

    def launch(self, spec: HostSpec, generation: int) -> RayHost:
        """Start the host on its node. ValueError if this launch was made already.

        It leaves the cores until it is ready to those that serve, and at a start of the whole mesh to Serve and the
        router, which have more to do before they need it.
        """
        allowed_faults = {failpoints.VARIABLE: "1"} if failpoints.enabled(os.environ) else {}
        options = {
            "name": _name(spec.host_id, generation),
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_gpus": float(spec.gpus),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(spec.node_id, soft=False),
            "runtime_env": {"env_vars": {**compute_environment(spec.threads), **allowed_faults}},
        }
        actor: Any = HostActor
        return RayHost(
            actor.options(**options).remote(spec, self._sources),
            spec.host_id,
            generation,
        )

    def find(self, host_id: str, generation: int | None = None) -> RayHost | None:
        """The launch of that number if it lives, without a number the newest that lives; None if there is none."""
        if generation is None:
            generation = max(self._living(host_id), default=0)
        try:
            actor = ray.get_actor(_name(host_id, generation), namespace=self._namespace)
        except ValueError:
            return None
        return RayHost(actor, host_id, generation)

    def _living(self, host_id: str) -> list[int]:
        """Numbers of the host's launches that live."""
        # With all namespaces Ray gives dictionaries, which its annotation does not say.
        named: list[Any] = list_named_actors(all_namespaces=True)
        names = [entry["name"].rpartition(":") for entry in named if entry["namespace"] == self._namespace]
        return [int(number) for name, _, number in names if name == _PREFIX + host_id]


class RayNodes:
    """The nodes of the connected cluster, less those whose raylet is seen to be gone before Ray says so."""

    def __init__(self) -> None:
        self._listening = Listening()

    def living(self) -> tuple[NodeInfo, ...]:
        alive = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
        raylets = {
            node_id: (str(node["NodeManagerAddress"]), int(node["NodeManagerPort"]))
            for node_id, node in alive.items()
        }
        gone = self._listening.gone(raylets)
        return nodes_from_ray([node for node_id, node in alive.items() if node_id not in gone])


def cause_of_death(told: str) -> str:
    """One line of the many that Ray tells of an actor's death."""
    lines = [line.strip() for line in told.splitlines() if line.strip()] or ["it died"]
    pid = next((line.removeprefix("pid: ") for line in lines if line.startswith("pid: ")), "?")
    if _NO_WORD in lines[-1]:
        return f"its process {pid} was killed or crashed"
    # Behind this come guesses at the cause.
    return lines[-1].rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]


def _leave_word(reason: str) -> None:
    """Why this process ends itself, for the controller to find."""
    name = ray.get_runtime_context().get_actor_name() or ""
    internal_kv._internal_kv_put(_LAST_WORDS + name.encode(), reason.encode(), overwrite=True)


def _last_words(host_id: str, generation: int) -> str:
    """Why a launch ended itself; nothing if it left no word."""
    words = internal_kv._internal_kv_get(_LAST_WORDS + _name(host_id, generation).encode())
    return words.decode() if words else ""


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _name(host_id: str, generation: int) -> str:
    return f"{_PREFIX}{host_id}:{generation}"
