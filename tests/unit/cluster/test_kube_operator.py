"""The operator over a fake of Kubernetes' API in memory."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kube import PODS, KubeApi, Resource
from cluster.kube_watch import Followed
from tests.fake_kube import FakeKube, Verb
from tests.kube_objects import pod
from tests.operator_contract import USED, OperatorContract, Scene, everything, running


class MemoryKube:
    def __init__(self) -> None:
        self.fake = FakeKube()

    def api(self, allowed: frozenset[Verb] | None = None) -> KubeApi:
        if allowed is not None:
            self.fake.denied = set(USED - allowed)
        return self.fake

    def put(self, resource: Resource, body: Any) -> None:
        self.fake.put(resource, body)

    def remove(self, resource: Resource, name: str) -> None:
        self.fake.remove(resource, name)

    def object(self, resource: Resource, name: str) -> dict[str, Any]:
        return self.fake.object(resource, name)

    def objects(self, resource: Resource) -> list[dict[str, Any]]:
        return self.fake.objects(resource)

    def restart(self) -> None:
        self.fake.away = True
        self.fake.end_watches()
        self.fake.away = False
        self.fake.forget()


@pytest.fixture
def kube() -> MemoryKube:
    return MemoryKube()


class TestOperator(OperatorContract):
    """The contract, in memory."""


def test_it_uses_those_verbs_and_no_others(kube: MemoryKube) -> None:
    scene = Scene(kube)
    operator = scene.operator()
    with running(operator):
        everything(scene, operator)
    assert kube.fake.used == USED


def test_after_410_everything_is_listed_again_and_nothing_missed() -> None:
    fake = FakeKube()
    fake.put(PODS, pod("one", "c", "a"))
    failed: list[Exception] = []
    followed = Followed(fake, PODS)
    with followed.following(failed.append):
        assert followed.synced(10)
        with fake._changed:
            fake.forget()
            fake.remove(PODS, "one")
            fake.put(PODS, pod("two", "c", "a"))
            fake.forget()
        for _ in range(500):
            if [p["metadata"]["name"] for p in followed.all()] == ["two"]:
                break
            followed._closed.wait(0.02)
        assert [p["metadata"]["name"] for p in followed.all()] == ["two"] and followed.listed >= 2
    fake.end_watches()
    assert not failed
