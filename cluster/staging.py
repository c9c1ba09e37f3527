"""What hosts must load for a version, and whether they have room for it: pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.changes import Snapshot
from cluster.deployment import Deployment
from cluster.errors import VersionConflictError
from cluster.inventory import weight_limits
from cluster.live_versions import LiveVersions
from cluster.reconcile import held_by_host
from cluster.table import PlacementTable


def bytes_by_host(
    deployment: Deployment, table: PlacementTable, coming: LiveVersions, held: Mapping[str, int]
) -> dict[str, int]:
    """Host → bytes of what it must load to have all of `coming`; no host that has it.

    `held` are the bytes that hosts say they hold: kernels keep weights as they like, in half the bytes of a row's
    dtype for one.
    """
    size = {layer.index: layer.expert_parameters * deployment.item_bytes for layer in deployment.layers}
    now, then = held_by_host(table.experts, table.versions), held_by_host(table.experts, coming)
    loads = {}
    for host_id, numbers in then.items():
        before = now.get(host_id, {})
        more = {layer: set(of_layer) - set(before.get(layer, ())) for layer, of_layer in numbers.items()}
        plain = sum(size[layer] * len(of_layer) for layer, of_layer in before.items())
        if total := sum(size[layer] * len(of_layer) for layer, of_layer in more.items()):
            loads[host_id] = total * held[host_id] // plain if held.get(host_id) and plain else total
    return loads


def check_room(snapshot: Snapshot, held: Mapping[str, int], loads: Mapping[str, int]) -> None:
    """VersionConflictError, with the numbers, if a host that holds so many bytes has no room for what it is to load."""
    deployment = snapshot.deployment
    limits = weight_limits(
        [(deployment.group(s.group), snapshot.hosts[s.host_id].node_id) for s in deployment.hosts],
        snapshot.nodes,
        reserved_memory=deployment.limits.reserved_bytes,
        reserved_gpus=deployment.limits.reserved_gpus,
    )
    for spec, limit in zip(deployment.hosts, limits, strict=True):
        more, have = loads.get(spec.host_id, 0), held.get(spec.host_id, 0)
        if more and have + more > limit:
            raise VersionConflictError(
                f"host {spec.host_id} holds {have / 1e6:.1f} MB of weights and has room for {limit / 1e6:.1f} MB: "
                f"the version's {more / 1e6:.1f} MB do not fit beside them",
                "let go of a version (`expertmesh versions unstage`), or add hosts",
            )
