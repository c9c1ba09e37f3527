"""Nodes from Ray's autoscaler: the edge between `cluster.autoscaler` and `ray.autoscaler.sdk`.

Ray keeps one request of this kind per cluster, the last one; so of several deployments on a cluster one may scale.
It does not end with who made it: a deployment that ends asks for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from cluster.node_shape import NodeShape, in_words

_CALL_S: Final = 10


# Looks at which a request that was cut down stays so, before all of it is tried again: types of nodes may be added.
_CUT_FOR: Final = 40


@dataclass(frozen=True, slots=True)
class Standing:
    """What becomes of a request, as Ray's autoscaler says."""

    starting: Mapping[str, int] = field(default_factory=dict)
    """Node type → nodes that were ordered, or are there without Ray."""
    failed: tuple[str, ...] = ()
    """Why nodes could not be had, newest last."""
    impossible: bool = False
    """Whether its types of nodes, each up to its limit, have no room for all that is asked for."""


class RayAutoscaler(Protocol):
    """The part of Ray that is used, as `ConnectedAutoscaler`."""

    def request(self, bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> None: ...

    def standing(self) -> Standing | None:
        """None if it does not say."""


class RayNodeProvider:
    """Asks for one bundle per host; for the autoscaler's process, which is connected to the cluster.

    Where not all of a request is possible, Ray starts no node at all. So each time that it is repeated and was
    impossible, one host fewer is asked for, until it is possible.
    """

    def __init__(self, autoscaler: RayAutoscaler | None = None) -> None:
        self._ray = autoscaler or ConnectedAutoscaler()
        self._wanted: Mapping[str, NodeShape] = {}
        self._asked: dict[str, int] = {}
        """Hosts by group, at most those that are wanted."""
        self._possible: dict[str, int] = {}
        """The last that Ray did not call impossible."""
        self._cut_for = 0

    def request(self, wanted: Mapping[str, NodeShape]) -> None:
        """Ray is to have room for all of it. ValueError for a selector that Ray does not read."""
        wanted = {group: shape for group, shape in sorted(wanted.items()) if shape.count}
        impossible = self._impossible()
        if self._asked and not impossible:
            self._possible = self._asked
        if wanted != self._wanted or self._cut_for >= _CUT_FOR:
            self._wanted, self._asked = wanted, {group: shape.count for group, shape in wanted.items()}
            self._cut_for = 0
        elif impossible:
            self._asked = one_fewer(self._asked, self._possible)
        self._cut_for += self._cut
        hosts = [wanted[group] for group, count in self._asked.items() for _ in range(count)]
        self._ray.request([bundle(host) for host in hosts], [selector(host) for host in hosts])

    def describe(self) -> str:
        """What was asked for last and what becomes of it, in one line."""
        if not self._wanted:
            return "Ray's autoscaler is asked for nothing"
        shapes = [
            replace(shape, count=self._asked[group])
            for group, shape in self._wanted.items()
            if group in self._asked
        ]
        parts = [f"Ray's autoscaler is asked for {', '.join(map(in_words, shapes)) or 'nothing'}"]
        standing = self._ray.standing()
        if standing is None:
            parts.append(
                "it is the first of Ray's, or none: it heeds no labels and does not say what it does; "
                "on a cluster of `ray start` join nodes by hand"
            )
            return "; ".join(parts)
        if self._cut:
            parts.append(f"{self._cut} more are not possible: no node type fits, or all are at their limit")
        elif standing.impossible:
            parts.append("not all of it is possible: no node type fits, or all are at their limit")
        if standing.starting:
            parts.append("starting " + ", ".join(f"{n} × {kind}" for kind, n in standing.starting.items()))
        if standing.failed:
            parts.append(f"failed: {standing.failed[-1]}")
        return "; ".join(parts)

    @property
    def _cut(self) -> int:
        """Hosts that are wanted and not asked for."""
        return sum(shape.count for shape in self._wanted.values()) - sum(self._asked.values())

    def _impossible(self) -> bool:
        standing = self._ray.standing() if self._asked else None
        return standing is not None and standing.impossible


class ConnectedAutoscaler:
    """The autoscaler of the cluster that this process is connected to."""

    def request(self, bundles: list[dict[str, float]], selectors: list[dict[str, str]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles, bundle_label_selectors=selectors)

    def standing(self) -> Standing | None:
        """None on a cluster with the first autoscaler, which tells the control plane nothing.

        As `ray status` asks, but that drops what does not fit (`ray.autoscaler.v2.sdk.get_cluster_status`).
        """
        from ray.autoscaler.v2.utils import is_autoscaler_v2
        from ray.core.generated import autoscaler_pb2
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        if not is_autoscaler_v2():
            return None
        messages: Any = autoscaler_pb2
        reply = messages.GetClusterStatusReply()
        reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=_CALL_S))
        return standing(reply.autoscaling_state)


def bundle(shape: NodeShape) -> dict[str, float]:
    """What one host takes, as Ray counts it; without what it does not take."""
    named = {"CPU": shape.cpus, "GPU": float(shape.gpus), "memory": shape.memory_bytes}
    return {name: amount for name, amount in named.items() if amount}


def selector(shape: NodeShape) -> dict[str, str]:
    """What the node's labels must be. Ray takes spaces for part of a label, which may have none."""
    return {key: value.replace(" ", "") for key, value in shape.labels.items()}


def one_fewer(asked: Mapping[str, int], possible: Mapping[str, int]) -> dict[str, int]:
    """One host fewer, of the group with most beyond what was possible."""
    group = max(asked, key=lambda name: (asked[name] - possible.get(name, 0), asked[name]))
    return {name: count - (name == group) for name, count in asked.items() if count > (name == group)}


def standing(state: Any) -> Standing:
    """From Ray's AutoscalingState message."""
    starting: Counter[str] = Counter()
    for ordered in state.pending_instance_requests:
        starting[ordered.ray_node_type_name] += ordered.count
    for instance in state.pending_instances:
        starting[instance.ray_node_type_name] += 1
    failed: Sequence[Any] = sorted(state.failed_instance_requests, key=lambda request: request.failed_ts)
    return Standing(
        dict(starting),
        tuple(f"{request.count} × {request.ray_node_type_name}: {request.reason}" for request in failed),
        bool(state.infeasible_cluster_resource_constraints),
    )
