"""Answers of an API server, and whose cluster is meant."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from cluster.kube_credentials import in_pod
from cluster.kube_errors import ConflictError, ForbiddenError, KubeError
from workloads.k8s_api import HttpApi, connect, proxy_for, read_answer

SERVER = "https://cluster.test"


def told(status: int, document: object) -> object:
    return read_answer(SERVER, "GET", "/version", status, json.dumps(document).encode())


def test_a_document_is_handed_on_and_404_is_nothing() -> None:
    assert told(200, {"a": 1}) == {"a": 1}
    assert told(404, {"kind": "Status", "message": "not found"}) is None


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, KubeError, "does not accept these credentials"),
        (403, ForbiddenError, "what the server says"),
        (409, ConflictError, "what the server says"),
        (422, KubeError, "answers 422 to GET /version: what the server says"),
        (503, KubeError, "answers 503"),
    ],
)
def test_any_other_answer_is_an_error_in_words(status: int, kind: type[KubeError], words: str) -> None:
    with pytest.raises(kind, match=words) as error:
        told(status, {"message": "what the server says"})
    assert error.value.hint


def test_an_answer_that_is_no_json_is_shown() -> None:
    with pytest.raises(KubeError, match="Bad Gateway"):
        read_answer(SERVER, "GET", "/x", 502, b"<html>Bad Gateway</html>")


def answering(handler: httpx.MockTransport) -> HttpApi:
    return HttpApi(SERVER, "default", httpx.Client(base_url=SERVER, transport=handler))


def test_a_trial_changes_nothing() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("PATCH", "/api/v1/namespaces/a/configmaps/b")
        assert dict(request.url.params) == {"fieldManager": "helm", "force": "true", "dryRun": "All"}
        assert request.headers["content-type"] == "application/apply-patch+yaml"
        return httpx.Response(200, json=json.loads(request.content))

    api = answering(httpx.MockTransport(handler))
    assert api.try_apply("/api/v1/namespaces/a/configmaps/b", {"kind": "ConfigMap"}, "helm") == {
        "kind": "ConfigMap"
    }


def test_a_server_that_is_out_of_reach_is_named() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    with pytest.raises(KubeError, match=r"cluster\.test does not answer: Connection refused"):
        answering(httpx.MockTransport(handler)).get("/version")


def test_a_pods_own_cluster_is_taken_where_no_other_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    assert in_pod(None, None, inside)
    assert not in_pod(None, None, {})
    assert not in_pod(tmp_path / "config", None, inside)
    assert not in_pod(None, "other", inside)
    assert not in_pod(None, None, {**inside, "KUBECONFIG": "x"})
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text("")
    assert not in_pod(None, None, inside)


def test_credentials_and_namespace_are_those_of_the_context(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes")
    file = tmp_path / "config"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": SERVER, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
                "contexts": [
                    {"name": "one", "context": {"cluster": "c", "user": "u"}},
                    {"name": "two", "context": {"cluster": "c", "user": "u", "namespace": "mesh"}},
                ],
                "current-context": "one",
            }
        )
    )
    assert connect(file).namespace == "default"
    api = connect(file, "two")
    assert (api.server, api.namespace) == (SERVER, "mesh")
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={})

    api._client._transport = httpx.MockTransport(handler)
    api._client._mounts = {}
    api.get("/version")
    assert seen == ["Bearer secret"]


def test_no_cluster_at_all_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kubernetes")
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KubeError, match="no cluster is configured here") as error:
        connect(tmp_path / "absent")
    assert "--kubeconfig" in error.value.hint


@pytest.mark.parametrize(
    ("proxy", "no_proxy", "asked"),
    [
        (None, None, None),
        ("http://proxy:1", None, "http://proxy:1"),
        ("http://proxy:1", "example.com", "http://proxy:1"),
        ("http://proxy:1", "example.com,.test", None),
        ("http://proxy:1", "*", None),
    ],
)
def test_a_proxy_is_passed_by_where_it_is_to_be(
    proxy: str | None, no_proxy: str | None, asked: str | None
) -> None:
    assert proxy_for(SERVER, proxy, no_proxy) == asked
