"""What a rendering would change, over documents."""

from __future__ import annotations

import pytest

from cluster.kube_errors import KubeError
from tests.unit.workloads.kube_documents import Documents
from workloads.k8s_api import Document
from workloads.k8s_diff import as_lines, changes, difference

NAMESPACE = "/api/v1/namespaces/expertmesh"
OWN = {"app.kubernetes.io/instance": "mesh", "app.kubernetes.io/managed-by": "Helm"}


def config_map(name: str = "one", **data: str) -> Document:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def live(document: Document) -> Document:
    metadata = {
        **document["metadata"],
        "namespace": "expertmesh",
        "uid": "u",
        "resourceVersion": "7",
        "managedFields": [{"manager": "helm"}],
        "annotations": {"meta.helm.sh/release-name": "mesh"},
    }
    return {**document, "metadata": metadata}


@pytest.fixture
def api() -> Documents:
    kinds = [
        {"name": "configmaps", "kind": "ConfigMap", "namespaced": True},
        {"name": "configmaps/finalize", "kind": "ConfigMap", "namespaced": True},
        {"name": "secrets", "kind": "Secret", "namespaced": True},
        {"name": "namespaces", "kind": "Namespace", "namespaced": False},
    ]
    return Documents({NAMESPACE: {"metadata": {}}, "/api/v1": {"resources": kinds}})


def test_nothing_is_said_of_what_is_as_it_should_be(api: Documents) -> None:
    api.found[f"{NAMESPACE}/configmaps/one"] = live(config_map(a="1"))
    assert list(changes(api, [config_map(a="1")], "expertmesh")) == []
    # Nothing but looks and tries.
    assert {method for method, _ in api.asked} == {"GET", "PATCH"}


def test_a_change_is_a_unified_diff_without_the_servers_own(api: Documents) -> None:
    api.found[f"{NAMESPACE}/configmaps/one"] = live(config_map(a="1", b="2"))
    (change,) = changes(api, [config_map(a="3", b="2")], "expertmesh")
    assert (change.action, change.kind, change.name) == ("change", "ConfigMap", "one")
    assert "-  a: '1'\n+  a: '3'\n" in change.text
    assert change.text.startswith(f"--- live{NAMESPACE}/configmaps/one\n")
    assert not {"resourceVersion", "managedFields", "uid"} & set(change.text.replace(":", " ").split())


def test_what_is_not_there_would_be_created(api: Documents) -> None:
    (change,) = changes(api, [config_map(a="1")], "expertmesh")
    assert change.action == "create" and change.text.startswith("--- /dev/null\n")
    assert f"{NAMESPACE}/configmaps/one" not in api.found


def test_what_a_release_has_left_over_would_be_removed(api: Documents) -> None:
    kept, old = live(config_map("one", a="1")), live(config_map("old", a="1"))
    made = live(config_map("made", a="1"))
    made["metadata"]["ownerReferences"] = [{"kind": "CronJob"}]
    for one in (kept, old, made):
        one["metadata"]["labels"] = OWN
        api.found[f"{NAMESPACE}/configmaps/{one['metadata']['name']}"] = one
    items = [{key: value for key, value in one.items() if key != "kind"} for one in (kept, old, made)]
    api.found[f"{NAMESPACE}/configmaps"] = {"kind": "ConfigMapList", "items": items}
    found = list(changes(api, [config_map("one", a="1")], "expertmesh", "mesh"))
    assert [(one.action, one.kind, one.name) for one in found] == [("remove", "ConfigMap", "old")]
    assert "+++ /dev/null" in found[0].text
    assert list(changes(api, [config_map("one", a="1")], "expertmesh")) == []


def test_what_only_helm_test_makes_is_left_out(api: Documents) -> None:
    document = config_map(a="1")
    document["metadata"]["annotations"] = {"helm.sh/hook": "test"}
    assert list(changes(api, [document], "expertmesh")) == []


def test_values_of_secrets_are_told_apart_and_not_shown() -> None:
    before = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"same": "c2FtZQ==", "new": "b25l"}}
    after = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"same": "c2FtZQ==", "new": "dHdv"}}
    text = difference("/x", before, after)
    assert "-  new: (hidden, before)\n+  new: (hidden, after)\n" in text and "-  same" not in text
    assert difference("/x", before, before) == ""
    for secret in ("c2FtZQ==", "b25l", "dHdv"):
        assert secret not in text + difference("/x", None, after) + difference("/x", before, None)


def test_a_cluster_without_the_namespace_or_the_kind_is_named(api: Documents) -> None:
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "mesh"}}
    with pytest.raises(KubeError, match=r"no RayService of ray\.io/v1") as error:
        list(changes(api, [service], "expertmesh"))
    assert "KubeRay" in error.value.hint
    with pytest.raises(KubeError, match="no namespace other"):
        list(changes(api, [config_map()], "other"))


def test_status_is_nobodys_to_write() -> None:
    text = "".join(as_lines({"kind": "RayJob", "metadata": {"name": "x"}, "spec": {}, "status": {"a": 1}}))
    assert "status" not in text and "spec" in text
