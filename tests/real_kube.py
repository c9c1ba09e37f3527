"""A real API server with KubeRay's kinds: as its admin, and as users who may less."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from cluster.kube import (
    EVENTS,
    LEASES,
    NODES,
    PODS,
    RAYCLUSTERS,
    RAYSERVICES,
    KubeApi,
    KubernetesApi,
    Resource,
)
from tests.e2e.programs import wait_for
from tests.kube_api_server import CRDS
from tests.kube_objects import NAMESPACE
from tests.operator_contract import Verb

_CRD: Final = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False)
_ROLE: Final = Resource("rbac.authorization.k8s.io", "v1", "clusterroles", namespaced=False)
_BINDING: Final = Resource("rbac.authorization.k8s.io", "v1", "clusterrolebindings", namespaced=False)
_NAMESPACES: Final = Resource("", "v1", "namespaces", namespaced=False)
# Whoever made a status says so apart from the rest.
_WITH_STATUS: Final = (PODS, RAYSERVICES, RAYCLUSTERS)
_MERGE: Final = {"Content-Type": "application/merge-patch+json"}


class RealKube:
    """The server as its admin, and as users who may less."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        config = yaml.safe_load(kubeconfig.read_text())
        server, token = config["clusters"][0]["cluster"]["server"], config["users"][0]["user"]["token"]
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=server, headers=headers, verify=False, timeout=30)

    def api(self, allowed: frozenset[Verb] | None = None) -> KubeApi:
        from kubernetes import client, config

        settings = client.Configuration()
        config.load_kube_config(str(self.kubeconfig), client_configuration=settings)
        settings.retries = False
        connected = client.ApiClient(settings)
        if allowed is not None:
            user = f"operator-{uuid.uuid4().hex[:8]}"
            rules = [
                {"apiGroups": [group], "resources": [plural], "verbs": [verb]}
                for group, plural, verb in sorted(allowed)
            ]
            rights = "rbac.authorization.k8s.io"
            self.put(_ROLE, {"metadata": {"name": user}, "rules": rules})
            self.put(
                _BINDING,
                {
                    "metadata": {"name": user},
                    "roleRef": {"apiGroup": rights, "kind": "ClusterRole", "name": user},
                    "subjects": [{"apiGroup": rights, "kind": "User", "name": user}],
                },
            )
            connected.set_default_header("Impersonate-User", user)
            self._wait_for(user, allowed)
        return KubernetesApi(connected, NAMESPACE)

    def _wait_for(self, user: str, allowed: frozenset[Verb]) -> None:
        """What a user may do is looked up in a cache, which is a moment behind."""
        if not allowed:
            return
        group, plural, verb = sorted(allowed)[-1]
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": user,
                "resourceAttributes": {
                    "group": group,
                    "resource": plural,
                    "verb": verb,
                    "namespace": NAMESPACE,
                },
            },
        }

        def may() -> bool:
            told = self._http.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=review)
            return bool(told.json()["status"]["allowed"])

        wait_for(may, 20, "the user to be known")

    def put(self, resource: Resource, body: Any) -> None:
        """Make it, or make it so."""
        name, path = body["metadata"]["name"], _path(resource)
        known = self._http.get(f"{path}/{name}")
        if known.status_code == 404:
            _checked(self._http.post(path, json=_typed(resource, body)))
            known = self._http.get(f"{path}/{name}")
        now = _checked(known)
        if resource == PODS:
            self._bind(now, body)
        else:
            metadata = {**body["metadata"], "resourceVersion": now["metadata"]["resourceVersion"]}
            changed = {**now, **body, "metadata": {**now["metadata"], **metadata}}
            _checked(self._http.put(f"{path}/{name}", json=_typed(resource, changed)))
        if resource in _WITH_STATUS and "status" in body:
            patch = json.dumps({"status": body["status"]})
            done = self._http.patch(f"{path}/{name}/status", content=patch, headers=_MERGE)
            _checked(done)

    def _bind(self, now: dict[str, Any], body: Any) -> None:
        """A pod gets its node by this alone."""
        wanted, name = body["spec"].get("nodeName"), body["metadata"]["name"]
        if wanted and not now["spec"].get("nodeName"):
            binding = {"target": {"kind": "Node", "name": wanted}, "metadata": {"name": name}}
            body = _typed(PODS, binding, "Binding")
            _checked(self._http.post(f"{_path(PODS)}/{name}/binding", json=body))

    def remove(self, resource: Resource, name: str) -> None:
        # At once: there is no kubelet that would say that a pod has ended.
        _checked(self._http.request("DELETE", f"{_path(resource)}/{name}", json={"gracePeriodSeconds": 0}))

    def object(self, resource: Resource, name: str) -> dict[str, Any]:
        return _checked(self._http.get(f"{_path(resource)}/{name}"))

    def objects(self, resource: Resource) -> list[dict[str, Any]]:
        return _checked(self._http.get(_path(resource)))["items"]

    def clear(self) -> None:
        for resource in (RAYSERVICES, RAYCLUSTERS, PODS, LEASES, EVENTS, NODES):
            for item in self.objects(resource):
                self.remove(resource, item["metadata"]["name"])

    def restart(self) -> None:
        """Kill the API server and start it as it was; etcd keeps what it had."""
        folder = self.kubeconfig.parent
        file = folder / "apiserver.pid"
        process = psutil.Process(int(file.read_text()))
        command = process.cmdline()
        os.kill(process.pid, signal.SIGKILL)
        # It is no child of ours, so it is gone when nobody of that number runs it any more.
        wait_for(lambda: not psutil.pid_exists(process.pid) or _is_dead(process), 20, "the API server to end")

        def start() -> subprocess.Popen[bytes]:
            with (folder / "apiserver.log").open("ab") as log:
                again = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            file.write_text(f"{again.pid}\n")
            return again

        running = start()

        def ready() -> bool:
            nonlocal running
            if running.poll() is not None:
                # Its port may be somebody's for a moment: the kernel gives it to whoever connects.
                running = start()
            try:
                return self._http.get("/readyz").text == "ok"
            except httpx.HTTPError:
                return False

        wait_for(ready, 120, "the API server to be ready again")


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _path(resource: Resource) -> str:
    root = f"/apis/{resource.group}/{resource.version}" if resource.group else f"/api/{resource.version}"
    return (
        f"{root}/namespaces/{NAMESPACE}/{resource.plural}"
        if resource.namespaced
        else f"{root}/{resource.plural}"
    )


def _typed(resource: Resource, body: Any, kind: str = "") -> dict[str, Any]:
    """With what says of what kind it is."""
    kinds = {
        PODS: "Pod",
        NODES: "Node",
        LEASES: "Lease",
        EVENTS: "Event",
        _ROLE: "ClusterRole",
        _BINDING: "ClusterRoleBinding",
        _NAMESPACES: "Namespace",
    }
    version = f"{resource.group}/{resource.version}" if resource.group else resource.version
    return {"apiVersion": version, "kind": kind or kinds.get(resource, body.get("kind")), **dict(body)}


def _checked(answer: httpx.Response) -> dict[str, Any]:
    assert answer.is_success, f"{answer.request.method} {answer.request.url}: {answer.text[:500]}"
    return answer.json()


def with_kuberays_kinds(kubeconfig: Path) -> RealKube:
    """The server, which has KubeRay's kinds and the tests' namespace from then on."""
    found = RealKube(kubeconfig)
    known = {crd["metadata"]["name"] for crd in found.objects(_CRD)}
    for file in sorted(CRDS.glob("*.json")):
        crd = json.loads(file.read_text())
        if crd["metadata"]["name"] not in known:
            _checked(found._http.post(_path(_CRD), json=crd))
    if NAMESPACE not in {item["metadata"]["name"] for item in found.objects(_NAMESPACES)}:
        found.put(_NAMESPACES, {"metadata": {"name": NAMESPACE}})
    wait_for(lambda: found._http.get(_path(RAYSERVICES)).is_success, 30, "KubeRay's kinds to be served")
    return found
