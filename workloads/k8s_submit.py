"""Create an object once and wait for what becomes of it: what the CronJob of expertmesh-learn runs.

A pod that is lost is begun again by its Job, with the same name for the RayJob: it finds the one that is there, and
goes on waiting. The RayJob belongs to the Job, so that it goes with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cluster.errors import ExpertmeshError
from cluster.kube_errors import ConflictError, KubeError
from workloads.k8s_api import Api, Document

JOBS: Final = "/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
# KubeRay makes names of Jobs and clusters of it.
_LONGEST_NAME: Final = 47
_LOOK_S: Final = 15.0


class RayJobError(ExpertmeshError):
    """The RayJob failed, is gone, or took too long."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The Job that a RayJob is to go with."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a RayJob ended."""

    name: str
    succeeded: bool
    said: str


def ray_job(manifest: Document, name: str, namespace: str, owner: Owner | None) -> Document:
    """The RayJob of a manifest, under this name. RayJobError if the manifest is of something else."""
    if manifest.get("kind") != "RayJob" or not str(manifest.get("apiVersion", "")).startswith("ray.io/"):
        raise RayJobError(
            f"the manifest is of a {manifest.get('kind')} ({manifest.get('apiVersion')})",
            "give a RayJob of ray.io/v1",
        )
    if len(name) > _LONGEST_NAME:
        raise RayJobError(
            f"{name} has {len(name)} characters, KubeRay takes {_LONGEST_NAME} for a RayJob",
            "give the release a shorter name, or set fullnameOverride",
        )
    metadata: dict[str, Any] = {
        **{key: value for key, value in manifest.get("metadata", {}).items() if key != "generateName"},
        "name": name,
        "namespace": namespace,
    }
    if owner is not None:
        metadata["ownerReferences"] = [
            {"apiVersion": "batch/v1", "kind": "Job", "name": owner.name, "uid": owner.uid}
        ]
    return {**manifest, "metadata": metadata}


def submit(api: Api, job: Document) -> bool:
    """Create it; False if it was there already, from an earlier try."""
    path = JOBS.format(namespace=job["metadata"]["namespace"])
    try:
        # A field that the CRD does not know would be dropped without a word.
        api.create(path, job, fieldValidation="Strict")
    except ConflictError:
        return False
    return True


def await_end(
    api: Api,
    namespace: str,
    name: str,
    timeout_s: float,
    told: Callable[[str], None] = lambda said: None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> Ended:
    """What became of it. RayJobError if it is gone, or has not ended within the time.

    An API server that is out of reach is asked again until then.
    """
    path = f"{JOBS.format(namespace=namespace)}/{name}"
    until, last = now() + timeout_s, ""
    while True:
        try:
            found = api.get(path)
        except KubeError as error:
            found, said = {}, error.message
        else:
            if found is None:
                raise RayJobError(f"the RayJob {name} is gone", "see `kubectl get events`")
            ended = end_of(name, found.get("status") or {})
            if ended is not None:
                return ended
            said = phase(found.get("status") or {})
        if said != last:
            told(f"{name}: {said}")
            last = said
        if now() >= until:
            raise RayJobError(
                f"the RayJob {name} has not ended within {timeout_s:g} s ({last})",
                f"see `kubectl -n {namespace} describe rayjob {name}`; it goes on",
            )
        sleep(_LOOK_S)


def end_of(name: str, status: Document) -> Ended | None:
    """How it ended, by its status; None if it has not."""
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment in ("Complete", "Failed"):
        why = ": ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
        succeeded = deployment == "Complete" and job in ("SUCCEEDED", "")
        return Ended(name, succeeded, why or job or deployment)
    return None


def phase(status: Document) -> str:
    """How far it is."""
    parts = [str(status[key]) for key in ("jobDeploymentStatus", "jobStatus") if status.get(key)]
    return ", ".join(parts) or "waits for KubeRay"
