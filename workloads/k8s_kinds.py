"""Where objects of a kind are in a cluster's API, as the cluster itself says."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.kube_errors import KubeError
from workloads.k8s_api import Api, Document

# What is to be had for kinds that a cluster may lack.
_FROM = {
    "ray.io": "install KubeRay's CRDs: k8s/kuberay/README.md",
    "monitoring.coreos.com": "install the Prometheus operator's CRDs, or set the chart's monitors to enabled: false",
    "gateway.networking.k8s.io": "install the Gateway API's CRDs, or use an Ingress",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of objects that the cluster has."""

    collection: str
    """Path up to the version, such as ``/apis/apps/v1``."""
    plural: str
    namespaced: bool

    def path(self, namespace: str, name: str = "") -> str:
        """Of one object, or of all in the namespace; objects that have none ignore it."""
        inside = f"/namespaces/{namespace}" if self.namespaced else ""
        return f"{self.collection}{inside}/{self.plural}" + (f"/{name}" if name else "")


class Kinds:
    """The kinds of one cluster, each group of which is asked for once."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, dict[str, Kind]] = {}

    def of(self, document: Document) -> Kind:
        """Where an object of this apiVersion and kind is. KubeError if the cluster has no such kind."""
        version, kind = str(document.get("apiVersion", "")), str(document.get("kind", ""))
        if version not in self._known:
            collection = f"/apis/{version}" if "/" in version else f"/api/{version}"
            self._known[version] = kinds_told(collection, self._api.get(collection))
        found = self._known[version].get(kind)
        if found is None:
            raise KubeError(
                f"{self._api.server} has no {kind} of {version}",
                _FROM.get(
                    version.partition("/")[0], "see `kubectl api-resources`; the cluster may be too old"
                ),
            )
        return found


def kinds_told(collection: str, told: Document | None) -> dict[str, Kind]:
    """Kind → where it is, of an APIResourceList; nothing of a group that is not there."""
    return {
        one["kind"]: Kind(collection, one["name"], bool(one["namespaced"]))
        for one in (told or {}).get("resources", ())
        # Others are parts of objects, such as pods/log.
        if "/" not in one["name"]
    }
