"""A RayJob that is created once, and waited for."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube_errors import KubeError
from tests.unit.workloads.kube_documents import Documents
from workloads.k8s_api import Document
from workloads.k8s_submit import Owner, RayJobError, await_end, end_of, ray_job, submit

MANIFEST: Document = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"labels": {"a": "b"}},
    "spec": {"entrypoint": "expertmesh learn serve"},
}
PATH = "/apis/ray.io/v1/namespaces/expertmesh/rayjobs/learn-1"


def test_the_rayjob_has_the_jobs_name_and_goes_with_it() -> None:
    job = ray_job(MANIFEST, "learn-1", "expertmesh", Owner("learn-1", "u-1"))
    assert job["metadata"] == {
        "labels": {"a": "b"},
        "name": "learn-1",
        "namespace": "expertmesh",
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "learn-1", "uid": "u-1"}],
    }
    assert job["spec"] == MANIFEST["spec"]
    assert "ownerReferences" not in ray_job(MANIFEST, "learn-1", "expertmesh", None)["metadata"]


@pytest.mark.parametrize(
    ("manifest", "name", "words"),
    [
        ({"apiVersion": "v1", "kind": "Pod"}, "x", "of a Pod"),
        ({}, "x", "of a None"),
        (MANIFEST, "x" * 48, "48 characters"),
    ],
)
def test_what_is_no_rayjob_is_refused(manifest: Document, name: str, words: str) -> None:
    with pytest.raises(RayJobError, match=words):
        ray_job(manifest, name, "expertmesh", None)


def test_a_second_try_finds_the_first_ones() -> None:
    api = Documents()
    job = ray_job(MANIFEST, "learn-1", "expertmesh", None)
    assert submit(api, job)
    assert not submit(api, job)
    assert api.found[PATH] == job


class Told(Documents):
    """Tells one status after the other; an exception is raised."""

    def __init__(self, *statuses: dict[str, Any] | Exception | None) -> None:
        super().__init__()
        self.statuses = list(statuses)

    def get(self, path: str, **query: str) -> Document | None:
        assert path == PATH
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return None if status is None else {"status": status}


def awaited(api: Documents, timeout_s: float = 100.0) -> tuple[Any, list[str]]:
    said: list[str] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    ended = await_end(api, "expertmesh", "learn-1", timeout_s, said.append, sleep, lambda: clock[0])
    return ended, said


def test_its_end_is_waited_for_and_each_phase_told_once() -> None:
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    ended, said = awaited(
        Told({}, running, running, KubeError("no answer"), running, {"jobDeploymentStatus": "Complete"})
    )
    assert ended.succeeded
    assert said == [
        "learn-1: waits for KubeRay",
        "learn-1: Running, RUNNING",
        "learn-1: no answer",
        "learn-1: Running, RUNNING",
    ]


def test_one_that_is_gone_or_late_is_an_error() -> None:
    with pytest.raises(RayJobError, match="is gone"):
        awaited(Told({}, None))
    with pytest.raises(RayJobError, match="has not ended within 100 s"):
        awaited(Told({"jobDeploymentStatus": "Initializing"}))


@pytest.mark.parametrize(
    ("status", "succeeded"),
    [
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, None),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, None),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, True),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, False),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "late"}, False),
    ],
)
def test_how_it_ended(status: Document, succeeded: bool | None) -> None:
    ended = end_of("x", status)
    assert (ended.succeeded if ended else None) is succeeded
    if status.get("reason"):
        assert ended is not None and ended.said == "DeadlineExceeded: late"
