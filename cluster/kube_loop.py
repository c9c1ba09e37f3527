"""The operator: looks at what Kubernetes has and what meshes want, and does what `cluster.kube_groups` says.

follow:  RayServices, RayClusters, pods and nodes, each in a thread; a change wakes the loop
look:    each mesh: read its groups, decide, drain, patch, show
lead:    only who holds the lease writes, to Kubernetes and to meshes; each write asks anew

It keeps nothing: after a restart, a lost lease or an API server that was away it decides from what is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from cluster import kube_status
from cluster.admin_client import MeshAdmin, MeshError, MeshStartingError
from cluster.groups_report import Drained
from cluster.kube import EVENTS, NODES, PODS, RAYCLUSTERS, RAYSERVICES, KubeApi, Object
from cluster.kube_errors import ConflictError, ForbiddenError, KubeError
from cluster.kube_groups import Todo, todo
from cluster.kube_objects import Cluster, Service, read_cluster, read_node, read_pods, read_service
from cluster.kube_patches import annotations_patch, event, resize_patch
from cluster.kube_watch import Followed
from cluster.leader import Leader, NotLeaderError

log = structlog.get_logger()

# Meshes are asked so often; Kubernetes says itself what changes.
_PERIOD_S: Final = 5.0
# Many changes come together.
_GAP_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Objects:
    """What Kubernetes has, of one namespace."""

    services: Sequence[Object]
    clusters: Sequence[Object]
    pods: Sequence[Object]
    nodes: Sequence[Object] | None
    """None where they can't be read."""


class Operator:
    """Of one namespace. `look` and `run` are for one thread."""

    def __init__(
        self,
        api: KubeApi,
        leader: Leader,
        mesh_of: Callable[[Cluster], MeshAdmin],
        *,
        service: str | None = None,
        watch_nodes: bool = True,
        period_s: float = _PERIOD_S,
        gap_s: float = _GAP_S,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`service` limits it to the RayService of that name."""
        self._api, self._leader, self._mesh_of, self._service = api, leader, mesh_of, service
        self._period_s, self._gap_s, self._wall = period_s, gap_s, wall
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._failed: list[Exception] = []
        kinds = (RAYSERVICES, RAYCLUSTERS, PODS, *((NODES,) if watch_nodes else ()))
        self._followed = {kind: Followed(api, kind, self._wake.set) for kind in kinds}
        self.looks = 0
        """How often it looked as the leader, in full."""

    def run(self) -> None:
        """Until `stop`. Raises what trying again does not mend, such as ForbiddenError."""
        with ExitStack() as stack:
            for followed in self._followed.values():
                stack.enter_context(followed.following(self._fail))
            stack.enter_context(self._leader.running(self._fail))
            while not self._stop.is_set():
                self._wake.wait(self._period_s)
                self._wake.clear()
                if not self._stop.is_set() and self._leader.holds() and self._all_synced():
                    self._look_on()
                # Not the event that wakes: `stop` is to be heard at once all the same.
                self._stop.wait(self._gap_s)
        if self._failed:
            raise self._failed[0]

    def run_once(self) -> None:
        """Look once. NotLeaderError while another operator leads; any KubeError."""
        self._leader.tick()
        try:
            self._leader.must_hold()
            for followed in self._followed.values():
                followed.refresh()
            self.look(self._objects())
        finally:
            self._leader.release()

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()
        self._wake.set()

    def look(self, seen: Objects) -> None:
        """See to every mesh once. NotLeaderError, ForbiddenError; what else goes wrong with one is logged."""
        for raw in seen.services:
            service = read_service(raw)
            if not service.has_hosts or self._service not in (None, service.name):
                continue
            try:
                self._see_to(service, seen)
            except (NotLeaderError, ForbiddenError):
                raise
            except ConflictError as error:
                # Decided anew at the next look, from what is there by then.
                log.info("changed meanwhile", service=service.name, reason=error.message)
            except (KubeError, MeshError) as error:
                log.warning("not seen to", service=service.name, reason=error.message)
        self.looks += 1

    def _look_on(self) -> None:
        try:
            self.look(self._objects())
        except NotLeaderError as error:
            log.warning("stopped writing", reason=error.message)
        except ForbiddenError as error:
            self._fail(error)
        except Exception:
            # What one object is like must not end the loop for the others.
            log.exception("look failed")

    def _see_to(self, service: Service, seen: Objects) -> None:
        cluster = next((c for c in seen.clusters if c["metadata"]["name"] == service.active), None)
        if not service.active or cluster is None:
            self._show(service, kube_status.starting("no cluster serves yet"))
            return
        known = read_cluster(cluster)
        mesh = self._mesh_of(known)
        try:
            report = mesh.groups()
        except MeshStartingError as error:
            self._show(service, kube_status.starting(error.message))
            return
        except MeshError as error:
            self._show(service, kube_status.unreachable(error.message))
            self._tell(service, "MeshUnreachable", error.message, warning=True)
            return
        nodes = None if seen.nodes is None else {n.name: n for n in map(read_node, seen.nodes)}
        found = todo(known, read_pods(seen.pods, known.name), nodes, report)
        self._drain(service, mesh, found)
        self._resize(service, known, found)
        self._show(service, kube_status.serving(report, found))
        for note in found.notes:
            self._tell(service, "NeedsAttention", note, warning=True)

    def _drain(self, service: Service, mesh: MeshAdmin, found: Todo) -> None:
        for drain in found.drains:
            self._leader.must_hold()
            drained = mesh.drain(drain.node_id, drain.reason)
            log.info("drained", pod=drain.pod, reason=drain.reason, leaving=drained.leaving, why=drained.why)
            self._wake.set()
            if drained.leaving or drained.staying:
                self._tell(service, "Draining", f"{drain.pod}: {drain.reason}; {_hosts(drained)}")
        for undrain in found.undrains:
            self._leader.must_hold()
            mesh.undrain(undrain.node_id)
            log.info("undrained", pod=undrain.pod)
            self._wake.set()

    def _resize(self, service: Service, cluster: Cluster, found: Todo) -> None:
        for resize in found.resizes:
            self._write("patch", RAYCLUSTERS, cluster.name, resize_patch(resize))
            group, names = resize.group, ", ".join(resize.deleted)
            log.info("resized", group=group.name, before=group.replicas, pods=resize.replicas, deleted=names)
            deleted = f", without {names}" if names else ""
            note = f"{cluster.name}, group {group.name}: {resize.replicas} pods instead of {group.replicas}{deleted}"
            self._tell(service, "Scaled", note)

    def _show(self, service: Service, annotations: dict[str, str]) -> None:
        patch = annotations_patch(service, annotations)
        if patch is not None:
            self._write("patch", RAYSERVICES, service.name, patch)

    def _tell(self, service: Service, reason: str, note: str, *, warning: bool = False) -> None:
        identity = self._leader.identity
        body = event(service, self._api.namespace, identity, reason, note, self._wall(), warning=warning)
        try:
            self._write("create", EVENTS, body)
        except ConflictError:
            # It was told before.
            pass
        except (NotLeaderError, ForbiddenError):
            raise
        except KubeError as error:
            log.warning("event not written", event=note, reason=error.message)

    def _write(self, verb: str, *arguments: Any) -> None:
        self._leader.must_hold()
        getattr(self._api, verb)(*arguments)

    def _objects(self) -> Objects:
        services, clusters, pods = (self._followed[k].all() for k in (RAYSERVICES, RAYCLUSTERS, PODS))
        nodes = self._followed[NODES].all() if NODES in self._followed else None
        return Objects(services, clusters, pods, nodes)

    def _all_synced(self) -> bool:
        return all(followed.synced(0) for followed in self._followed.values())

    def _fail(self, error: Exception) -> None:
        self._failed.append(error)
        self.stop()


def _hosts(drained: Drained) -> str:
    parts = [f"{', '.join(drained.leaving)} go elsewhere"] if drained.leaving else []
    if drained.staying:
        parts.append(f"{', '.join(drained.staying)} can't yet: {drained.why}")
    return "; ".join(parts)
