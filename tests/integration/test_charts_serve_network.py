"""The chart expertmesh-serve: who reaches whom, what is selected, and what is watched."""

from __future__ import annotations

import json
from typing import Any

from tests.charts import serve_chart as chart
from tests.charts.helm import Object, of_kind, one
from tests.charts.prometheus_series import exported, series
from tests.charts.selectors import matches, pods, selected


def test_selectors_mean_exactly_the_pods_that_they_should() -> None:
    objects = chart.render("mixed")
    everyone = pods(objects)
    mesh = {"head", "router", "gpu", "cpu"}
    test = "mesh-expertmesh-serve-ask"
    assert {pod.name for pod in everyone} == {*mesh, test}
    name = "mesh-expertmesh-serve"
    policies = {
        item["metadata"]["name"].removeprefix(f"{name}-"): selected(item["spec"]["podSelector"], everyone)
        for item in of_kind(objects, "NetworkPolicy")
    }
    assert policies == {
        "deny": mesh,
        "mesh": mesh,
        "dns": mesh,
        "api": {"router"},
        "kuberay": {"head"},
        "admin": {"head"},
        "engine-metrics": {"router"},
        "ray-metrics": mesh,
        "test": {test},
    }
    budgets = {
        item["metadata"]["name"].removeprefix(f"{name}-"): (
            selected(item["spec"]["selector"], everyone),
            item["spec"]["minAvailable"],
        )
        for item in of_kind(objects, "PodDisruptionBudget")
    }
    assert budgets == {"router": ({"router"}, 1), "gpu": ({"gpu"}, 1), "cpu": ({"cpu"}, 1)}
    services = {
        item["metadata"]["name"]: selected({"matchLabels": item["spec"]["selector"]}, everyone)
        for item in of_kind(objects, "Service")
    }
    assert services == {f"{name}-api": {"router"}, f"{name}-admin": {"head"}}
    assert selected(one(objects, "PodMonitor")["spec"]["selector"], everyone) == mesh
    monitor = one(objects, "ServiceMonitor")["spec"]
    found = [s for s in of_kind(objects, "Service") if matches(monitor["selector"], s["metadata"]["labels"])]
    assert [service["metadata"]["name"] for service in found] == [f"{name}-api"]
    for group in [pod for pod in everyone if pod.name in ("router", "gpu", "cpu")]:
        (spread,) = group.template["spec"]["topologySpreadConstraints"]
        assert selected(spread["labelSelector"], everyone) == {group.name}


def test_another_release_is_not_meant() -> None:
    others = pods(chart.render("mixed", release="other"))
    for item in of_kind(chart.render("mixed"), "NetworkPolicy"):
        assert selected(item["spec"]["podSelector"], others) == set()


def _allowed(objects: list[Object], role: str, direction: str) -> list[tuple[Any, list[int]]]:
    """(peers, ports) of all rules for the pods of that role; peers None: anyone, no ports: all."""
    labels = next(pod.labels for pod in pods(objects) if pod.labels.get("expertmesh.io/role") == role)
    found = []
    for item in of_kind(objects, "NetworkPolicy"):
        if matches(item["spec"]["podSelector"], labels):
            peers = {"ingress": "from", "egress": "to"}[direction]
            for rule in item["spec"].get(direction) or ():
                found.append((rule.get(peers), [port["port"] for port in rule.get("ports") or ()]))
    return found


def test_network_policies_let_in_what_is_meant_and_no_more() -> None:
    objects = chart.render("mixed")
    (deny,) = [p for p in of_kind(objects, "NetworkPolicy") if p["metadata"]["name"].endswith("-deny")]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny["spec"] and "egress" not in deny["spec"]
    # Everyone: the mesh itself, and Ray's metrics.
    assert sorted(ports for _, ports in _allowed(objects, "host", "ingress")) == [[], [8090]]
    assert sorted(ports for _, ports in _allowed(objects, "router", "ingress")) == [
        [],
        [8080],
        [8080],
        [8090],
    ]
    assert sorted(ports for _, ports in _allowed(objects, "head", "ingress")) == [
        [],
        [8081],
        [8090],
        [8265, 8000],
    ]
    # Nobody is let in from just anywhere, and all ports are for the mesh's own pods alone.
    for role in ("head", "router", "host", "test"):
        for peers, ports in _allowed(objects, role, "ingress"):
            assert peers
            if not ports:
                assert [set(peer) for peer in peers] == [{"podSelector"}]
    # Out: the mesh, and names.
    assert sorted(ports for _, ports in _allowed(objects, "host", "egress")) == [[], [53, 53]]


def test_network_policies_of_stores_and_the_autoscaler() -> None:
    stored = chart.render("object-store")
    assert dict_by_ports(_allowed(stored, "host", "egress"))[9000] == [{"ipBlock": {"cidr": "10.0.0.0/24"}}]
    assert 6379 in dict_by_ports(_allowed(stored, "head", "egress"))
    assert 6379 not in dict_by_ports(_allowed(stored, "host", "egress"))
    assert 4317 in dict_by_ports(_allowed(stored, "router", "egress"))
    scaled = chart.render("autoscaled")
    assert 6443 in dict_by_ports(_allowed(scaled, "head", "egress"))
    assert 6443 not in dict_by_ports(_allowed(scaled, "router", "egress"))


def dict_by_ports(rules: list[tuple[Any, list[int]]]) -> dict[int, Any]:
    """Peers by port."""
    return {port: peers for peers, ports in rules for port in ports}


def test_ways_in_from_outside() -> None:
    """A route and an Ingress lead to the API, by its public paths, where metrics are not among them."""
    route = one(chart.render("mixed"), "HTTPRoute")["spec"]
    assert route["hostnames"] == ["models.example"]
    (rule,) = route["rules"]
    assert rule["backendRefs"] == [{"name": "mesh-expertmesh-serve-api", "port": 8080}]
    paths = [match["path"]["value"] for match in rule["matches"]]
    objects = chart.render("exposed")
    (of_host,) = one(objects, "Ingress")["spec"]["rules"]
    assert [path["path"] for path in of_host["http"]["paths"]] == paths
    assert "/v1" in paths
    assert not [path for path in paths if "/metrics".startswith(path) or "/expertmesh/stats".startswith(path)]
    service = one(objects, "Service", "experts-api")["spec"]
    backend = of_host["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "experts-api", "port": {"name": service["ports"][0]["name"]}}


def test_dashboard_and_alerts_read_series_that_there_are() -> None:
    objects = chart.render("mixed")
    dashboard = json.loads(
        one(objects, "ConfigMap", "mesh-expertmesh-serve-dashboard")["data"]["expertmesh.json"]
    )
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    rules = [rule for group in one(objects, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    assert len(targets) >= 20 and len(rules) >= 8
    for expression in [*targets, *(rule["expr"] for rule in rules)]:
        read = series(expression)
        assert read, expression
        assert read <= exported(), f"{expression} reads {read - exported()}"
    for rule in rules:
        assert 'namespace="models",service="mesh-expertmesh-serve-api"' in rule["expr"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in (
            "critical",
            "warning",
            "info",
        )
    assert len({rule["alert"] for rule in rules}) == len(rules)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_scraping_brings_the_key() -> None:
    """The API asks for a key at /metrics as well."""
    (endpoint,) = one(chart.render("mixed"), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "mesh-keys", "key": "EXPERTMESH_API_KEY"}
