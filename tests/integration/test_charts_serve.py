"""The chart expertmesh-serve: what it renders is what the program, Ray and KubeRay expect of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import Config, load_config
from cluster.inventory import slots
from cluster.messages import NodeInfo
from tests.charts import matrix
from tests.charts.helm import CHARTS, Helm, Object, Refused, of_kind, one
from tests.charts.kubernetes_schemas import pod_templates
from tests.charts.prometheus_series import exported, series
from tests.charts.selectors import matches, pods, selected

CHART = "expertmesh-serve"
CI = CHARTS / CHART / "ci"
_KEYS = {"EXPERTMESH_API_KEY": "an api key", "EXPERTMESH_ADMIN_KEY": "an admin key"}
_ROWS = [row for row in matrix.rows() if row.chart == CHART and row.switch in (matrix.PLAIN, "own-store")]
# Rendered by one helm: that the other renders the same is looked at in test_charts.py.
HELM = Helm(4)


def _render(example: str = "cpu", values: dict[str, Any] | None = None, **options: Any) -> list[Object]:
    return HELM.template(CHART, [CI / f"{example}-values.yaml"], values, **options)


def _cluster(objects: list[Object]) -> dict[str, Any]:
    return one(objects, "RayService")["spec"]["rayClusterConfig"]


def _groups(objects: list[Object]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in _cluster(objects)["workerGroupSpecs"]}


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def _config(objects: list[Object], folder: Path) -> Config:
    """What the program makes of the ConfigMap."""
    name = one(objects, "RayService")["metadata"]["name"]
    file = folder / "expertmesh.yaml"
    file.write_text(one(objects, "ConfigMap", name)["data"]["expertmesh.yaml"])
    return load_config(file, {}, _KEYS).config


@pytest.mark.parametrize("row", _ROWS, ids=str)
def test_the_program_reads_its_configuration(row: matrix.Row, tmp_path: Path) -> None:
    """The ConfigMap is what pods mount, what the program reads, and agrees with the groups of pods."""
    objects = row.render(HELM)
    config, groups = _config(objects, tmp_path), _groups(objects)
    assert config.server.host == "0.0.0.0" and config.server.port == 8080 and config.admin.port == 8081
    assert [key.get_secret_value() for key in config.server.api_keys] == ["an api key"]
    assert [key.get_secret_value() for key in config.admin.keys] == ["an admin key"]
    assert [group.name for group in config.hosts] == [name for name in groups if name != "router"]
    for host in config.hosts:
        group = groups[host.name]
        assert host.count == group["replicas"]
        limits = _container(group)["resources"]["limits"]
        assert (host.device == "cuda") == ("nvidia.com/gpu" in limits)
        assert host.autoscale is None or (host.autoscale.min, host.autoscale.max) == (
            group["minReplicas"],
            group["maxReplicas"],
        )
    assert config.engine.replicas == groups["router"]["replicas"]
    scaled = [host for host in config.hosts if host.autoscale]
    assert not scaled or row.file.stem in ("mixed-values", "autoscaled-values")


@pytest.mark.parametrize("example", ["cpu", "gpu", "mixed", "rocksdb"])
def test_each_host_has_a_pod_of_its_own(example: str, tmp_path: Path) -> None:
    """The rendered groups as Ray nodes: the planner lays one host on each, on those of its group."""
    objects = _render(example)
    nodes = []
    for name, group in _groups(objects).items():
        limits = _container(group)["resources"]["limits"]
        start = group["rayStartParams"]
        cpus = float(start["num-cpus"]) if "num-cpus" in start else _cpus(limits["cpu"])
        memory = int(limits["memory"].removesuffix("Gi")) << 30
        nodes += [
            NodeInfo(
                f"{name}-{index}",
                "",
                f"{name}-{index}",
                cpus,
                limits.get("nvidia.com/gpu", 0),
                memory,
                group["labels"],
            )
            for index in range(group["replicas"])
        ]
    placed = slots(_config(objects, tmp_path).hosts, nodes)
    assert sorted(slot.node_id for slot in placed) == sorted(
        node.node_id for node in nodes if not node.node_id.startswith("router")
    )
    assert all(
        slot.host_id == slot.node_id or slot.group == slot.node_id.rpartition("-")[0] for slot in placed
    )


def _cpus(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1)


@pytest.mark.parametrize(("quantity", "threads"), [("8", 8), (8, 8), ("7500m", 7), ("2.5", 2), ("500m", 1)])
def test_threads_are_whole_cpus_of_the_limit(quantity: str | int, threads: int, tmp_path: Path) -> None:
    limits = {"limits": {"cpu": quantity, "memory": "8Gi"}}
    objects = _render(
        values={
            "router": {"resources": limits},
            "hostDefaults": {"resources": limits},
            "hostGroups": [{"name": "a", "replicas": 2}],
        }
    )
    config = _config(objects, tmp_path)
    assert config.engine.threads == threads
    assert config.hosts[0].threads == threads


def test_serve_config_is_what_ray_serve_reads() -> None:
    """By Ray Serve's own schema; its proxy runs on the head alone, and listens where KubeRay asks it."""
    from ray.serve.config import ProxyLocation
    from ray.serve.schema import ServeDeploySchema

    text = one(_render(), "RayService")["spec"]["serveConfigV2"]
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert parsed.proxy_location == ProxyLocation.HeadOnly
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", 8000)
    (application,) = parsed.applications
    assert (application.name, application.route_prefix) == ("expertmesh", "/")
    assert application.import_path == "workloads.ray_service:application"
    # Where every pod has the ConfigMap.
    assert application.args == {"config": "/etc/expertmesh/expertmesh.yaml"}
    for _, template in pod_templates(one(_render(), "RayService")):
        (container,) = template["spec"]["containers"]
        paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert paths["config"] == "/etc/expertmesh"
        assert volumes["config"]["configMap"]["name"] == "mesh-expertmesh-serve"
        assert set(paths) == set(volumes)


def test_labels_of_ray_nodes_are_those_of_pods_and_selectors(tmp_path: Path) -> None:
    """Ray's labels come from the groups' field, never from rayStartParams, and selectors of the program match them."""
    objects = _render("mixed")
    groups, config = _groups(objects), _config(_render("mixed"), tmp_path)
    assert groups["router"]["labels"] == {"expertmesh.io/role": "router"}
    assert groups["cpu"]["labels"] == {
        "expertmesh.io/role": "host",
        "expertmesh.io/group": "cpu",
        "zone": "b",
    }
    head = _cluster(objects)["headGroupSpec"]
    for group in (head, *groups.values()):
        assert "labels" not in group["rayStartParams"]
        pod_labels = group["template"]["metadata"]["labels"]
        assert group["labels"].items() <= pod_labels.items()
        # KubeRay's Services select by these, with its own values.
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & set(pod_labels)
    selectors = {"router": config.engine.selector, "head": config.ray.controller_selector}
    selectors |= {host.name: host.selector for host in config.hosts}
    labels = {"head": head["labels"], **{name: group["labels"] for name, group in groups.items()}}
    for meant, selector in selectors.items():
        assert [name for name, have in labels.items() if selector.items() <= have.items()] == [meant]


def test_pods_get_ready_by_what_they_do() -> None:
    """Without a probe of its own KubeRay would wait for Ray Serve's proxy on every worker, where there is none."""
    objects = _render("mixed")
    groups = _groups(objects)
    probe = _container(groups["router"])["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["port"]) == ("/health", "http")
    for name in ("gpu", "cpu"):
        assert _container(groups[name])["readinessProbe"]["httpGet"]["port"] == 52365
    assert {"name": "http", "containerPort": 8080} in _container(groups["router"])["ports"]


def test_ports_of_one_pod_are_apart() -> None:
    """KubeRay lets Ray export metrics on 8080, where the API listens, if it is not told otherwise."""
    objects = _render()
    for group in (_cluster(objects)["headGroupSpec"], *_groups(objects).values()):
        ports = [port["containerPort"] for port in _container(group)["ports"]]
        assert len(set(ports)) == len(ports)
        exported_at = {p["name"]: p["containerPort"] for p in _container(group)["ports"]}["metrics"]
        assert group["rayStartParams"]["metrics-export-port"] == str(exported_at)
    # All that KubeRay's head Service and its health checks look for by name.
    names = {port["name"] for port in _container(_cluster(objects)["headGroupSpec"])["ports"]}
    assert {"gcs-server", "dashboard", "client", "serve", "metrics", "admin"} == names


def test_the_head_computes_nothing_and_a_router_pod_holds_one_engine() -> None:
    objects = _render("gpu")
    assert _cluster(objects)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert _groups(objects)["router"]["rayStartParams"]["num-cpus"] == "1"


def test_token_authentication_is_on_unless_switched_off() -> None:
    assert _cluster(_render())["authOptions"] == {"mode": "token"}
    assert _cluster(_render("rocksdb"))["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert _cluster(_render(values={"rayAuth": {"mode": "disabled"}}))["authOptions"] == {"mode": "disabled"}


def test_a_changed_configuration_is_a_changed_cluster_and_nothing_else_is() -> None:
    """KubeRay brings up a new cluster where the spec changes: for a new configuration, not for a new chart."""

    def templates(values: dict[str, Any] | None = None) -> list[Any]:
        return [template for _, template in pod_templates(one(_render(values=values), "RayService"))]

    assert all(
        a != b for a, b in zip(templates(), templates({"config": {"log_level": "debug"}}), strict=True)
    )
    assert templates() == templates({"monitoring": {"rules": {"enabled": True}}})
    for template in templates():
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(template["metadata"]["labels"])


def test_images() -> None:
    """CPU pods run the image, GPU pods its variant; a digest counts before a tag."""
    objects = _render("mixed")
    groups = _groups(objects)
    assert _container(groups["cpu"])["image"] == "expertmesh:0.1.0"
    assert (
        _container(groups["gpu"])["image"] == _container(groups["router"])["image"] == "expertmesh:0.1.0-gpu"
    )
    digest = "sha256:" + "a" * 64
    assert _container(_groups(_render("gpu", {"image": {"gpuDigest": digest}}))["gpu"])["image"].endswith(
        f"@{digest}"
    )


def test_scaling_by_the_operator_leaves_rays_autoscaler_off(tmp_path: Path) -> None:
    objects = _render("mixed")
    assert _cluster(objects)["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in _cluster(objects)
    cpu = _groups(objects)["cpu"]
    assert (cpu["minReplicas"], cpu["replicas"], cpu["maxReplicas"]) == (2, 3, 8)
    (host,) = [host for host in _config(objects, tmp_path).hosts if host.name == "cpu"]
    assert host.autoscale is not None and host.autoscale.down_cooldown == 600


def test_scaling_by_ray() -> None:
    cluster = _cluster(_render("autoscaled"))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    head = cluster["headGroupSpec"]["template"]["spec"]
    # The autoscaler beside it talks to Kubernetes, with an account that KubeRay makes.
    assert head["automountServiceAccountToken"] is True and "serviceAccountName" not in head


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("cpu", None),
        (
            "object-store",
            {
                "backend": "redis",
                "redisAddress": "redis.databases.svc:6379",
                "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
            },
        ),
        ("rocksdb", {"backend": "rocksdb", "storage": {"claimName": "mesh-tables"}}),
    ],
)
def test_fault_tolerance(example: str, expected: object) -> None:
    assert _cluster(_render(example)).get("gcsFaultToleranceOptions") == expected


def test_a_volume_for_rays_tables_that_kuberay_makes() -> None:
    options = _cluster(_render(values={"gcsFaultTolerance": {"backend": "rocksdb"}}))[
        "gcsFaultToleranceOptions"
    ]
    assert options["storage"] == {
        "size": "10Gi",
        "accessModes": ["ReadWriteOnce"],
        "deletionPolicy": "DeleteWithCluster",
    }


def test_claims() -> None:
    """What the chart makes of storage, and keeps when it goes."""
    assert [claim["metadata"]["name"] for claim in of_kind(_render(), "PersistentVolumeClaim")] == [
        "mesh-expertmesh-serve-versions"
    ]
    made = of_kind(HELM.template(CHART, [], {"keys": {"existingSecret": "k"}}), "PersistentVolumeClaim")
    assert [claim["spec"]["accessModes"] for claim in made] == [["ReadWriteMany"], ["ReadWriteMany"]]
    assert all(claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for claim in made)
    stored = _render("object-store")
    assert not of_kind(stored, "PersistentVolumeClaim")
    for _, template in pod_templates(one(stored, "RayService")):
        assert "versions" not in {volume["name"] for volume in template["spec"]["volumes"]}
        assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "object-store"}}]


def test_keys_are_made_where_none_are_named() -> None:
    secret = one(HELM.template(CHART, [], {}), "Secret")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert set(secret["data"]) == set(_KEYS)
    assert len(set(secret["data"].values())) == 2 and all(len(key) > 40 for key in secret["data"].values())
    assert not of_kind(_render(), "Secret")


def test_selectors_mean_exactly_the_pods_that_they_should() -> None:
    objects = _render("mixed")
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
    others = pods(_render("mixed", release="other"))
    for item in of_kind(_render("mixed"), "NetworkPolicy"):
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
    objects = _render("mixed")
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
    stored = _render("object-store")
    assert dict_by_ports(_allowed(stored, "host", "egress"))[9000] == [{"ipBlock": {"cidr": "10.0.0.0/24"}}]
    assert 6379 in dict_by_ports(_allowed(stored, "head", "egress"))
    assert 6379 not in dict_by_ports(_allowed(stored, "host", "egress"))
    assert 4317 in dict_by_ports(_allowed(stored, "router", "egress"))
    scaled = _render("autoscaled")
    assert 6443 in dict_by_ports(_allowed(scaled, "head", "egress"))
    assert 6443 not in dict_by_ports(_allowed(scaled, "router", "egress"))


def dict_by_ports(rules: list[tuple[Any, list[int]]]) -> dict[int, Any]:
    """Peers by port."""
    return {port: peers for peers, ports in rules for port in ports}


def test_ways_in_from_outside() -> None:
    """A route and an Ingress lead to the API, by its public paths, where metrics are not among them."""
    route = one(_render("mixed"), "HTTPRoute")["spec"]
    assert route["hostnames"] == ["models.example"]
    (rule,) = route["rules"]
    assert rule["backendRefs"] == [{"name": "mesh-expertmesh-serve-api", "port": 8080}]
    paths = [match["path"]["value"] for match in rule["matches"]]
    objects = _render("exposed")
    (of_host,) = one(objects, "Ingress")["spec"]["rules"]
    assert [path["path"] for path in of_host["http"]["paths"]] == paths
    assert "/v1" in paths
    assert not [path for path in paths if "/metrics".startswith(path) or "/expertmesh/stats".startswith(path)]
    service = one(objects, "Service", "experts-api")["spec"]
    backend = of_host["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "experts-api", "port": {"name": service["ports"][0]["name"]}}


def test_dashboard_and_alerts_read_series_that_there_are() -> None:
    objects = _render("mixed")
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
    (endpoint,) = one(_render("mixed"), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "mesh-keys", "key": "EXPERTMESH_API_KEY"}


def test_the_helm_test_asks_with_the_key() -> None:
    pod = one(_render(), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    compile(container["args"][0], "ask.py", "exec")
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert variables["API_URL"] == "http://mesh-expertmesh-serve-api:8080"
    assert not of_kind(_render(values={"tests": {"enabled": False}}), "Pod")


def test_values_may_say_all_of_the_configuration_but_what_the_chart_decides() -> None:
    """A key that the program gains is missing here until the chart says whose it is."""
    schema = json.loads((CHARTS / CHART / "values.schema.json").read_text())["properties"]["config"]
    decided = {
        "": {"hosts", "ray", "admin"},
        "engine": {"replicas", "device", "selector"},
        "server": {"host", "port", "api_keys"},
        "versions": {"store"},
    }
    assert set(schema["properties"]) | decided[""] == set(Config.model_fields)
    for section in ("engine", "server", "versions"):
        model = type(getattr(Config(), section))
        given = set(schema["properties"][section]["properties"])
        assert given | decided[section] == set(model.model_fields)
        assert not given & decided[section]


def test_names_are_as_long_as_kuberay_takes_and_no_longer() -> None:
    assert one(_render(release="r" * 30), "RayService")["metadata"]["name"] == f"{'r' * 30}-{CHART}"
    with pytest.raises(Refused, match="fullnameOverride"):
        _render(release="r" * 31)


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"replicas": 3}, "replicas"),
    "unknown key of a group": ({"hostGroups": [{"name": "a", "count": 2}]}, "count"),
    "unknown key of a toleration": ({"head": {"tolerations": [{"keys": "a"}]}}, "keys"),
    "unknown key of the configuration": ({"config": {"placement": {"replica": 2}}}, "replica"),
    "the chart's part of the configuration": ({"config": {"hosts": []}}, "hosts"),
    "the chart's part of a section": ({"config": {"server": {"port": 80}}}, "port"),
    "wrong choice in the configuration": ({"config": {"placement": {"no_replica": "ignore"}}}, "no_replica"),
    "latest": ({"image": {"tag": "latest"}}, "tag"),
    "latest for GPUs": ({"image": {"gpuTag": "latest"}}, "gpuTag"),
    "half a digest": ({"image": {"digest": "sha256:abc"}}, "digest"),
    "unknown device": ({"hostGroups": [{"name": "a", "device": "tpu"}]}, "device"),
    "no groups": ({"hostGroups": []}, "hostGroups"),
    "a group without a name": ({"hostGroups": [{"replicas": 2}]}, "name"),
    "a group called as the routers are": ({"hostGroups": [{"name": "router"}]}, "name"),
    "capitals in a name": ({"hostGroups": [{"name": "GPU"}]}, "name"),
    "two groups of a name": ({"hostGroups": [{"name": "a"}, {"name": "a"}]}, r"hostGroups\.1\.name"),
    "no replicas": ({"router": {"replicas": 0}}, "replicas"),
    "a share of pods": ({"router": {"minAvailable": "50%"}}, "minAvailable"),
    "all pods kept": ({"hostGroups": [{"name": "a", "replicas": 2, "minAvailable": 2}]}, "minAvailable"),
    "no GPU": ({"hostGroups": [{"name": "a", "device": "cuda"}]}, r"hostGroups\.0\.resources"),
    "a GPU for nobody": (
        {"router": {"resources": {"limits": {"cpu": 1, "memory": "1Gi", "nvidia.com/gpu": 1}}}},
        r"router\.resources",
    ),
    "no limit": ({"hostGroups": [{"name": "a", "resources": {"limits": {"cpu": 1}}}]}, r"limits\.memory"),
    "nobody scales": ({"hostGroups": [{"name": "a", "autoscale": {"min": 1, "max": 2}}]}, "autoscale"),
    "bounds without a maximum": (
        {"operator": {"enabled": True}, "hostGroups": [{"name": "a", "autoscale": {"min": 1}}]},
        "max",
    ),
    "outside its bounds": (
        {
            "operator": {"enabled": True},
            "hostGroups": [{"name": "a", "replicas": 5, "autoscale": {"min": 1, "max": 2}}],
        },
        r"hostGroups\.0\.replicas",
    ),
    "two that scale": (
        {"operator": {"enabled": True}, "autoscaling": {"enabled": True}},
        "autoscaling.enabled",
    ),
    "Ray without tokens": ({"rayVersion": "2.51.0"}, "rayVersion"),
    "Ray of no version": ({"rayVersion": "nightly"}, "rayVersion"),
    "Redis nowhere": ({"gcsFaultTolerance": {"backend": "redis"}}, r"gcsFaultTolerance\.redis\.address"),
    "a volume that two would write": (
        {"gcsFaultTolerance": {"backend": "rocksdb", "rocksdb": {"claimName": "a"}}},
        "claimName",
    ),
    "half a Secret's key": (
        {"gcsFaultTolerance": {"redis": {"passwordSecret": {"name": "a"}}}},
        "passwordSecret",
    ),
    "two stores": (
        {"storage": {"versions": {"url": "s3://a/b", "existingClaim": "c"}}},
        r"storage\.versions\.existingClaim",
    ),
    "a store of no kind": ({"storage": {"versions": {"url": "bucket"}}}, "url"),
    "a route of no Gateway": ({"gateway": {"enabled": True}}, r"gateway\.parentRefs"),
    "a route that is closed": (
        {"gateway": {"enabled": True, "parentRefs": [{"name": "public"}]}},
        r"networkPolicy\.gatewayFrom",
    ),
    "an Ingress for any name": ({"ingress": {"enabled": True}}, r"ingress\.hosts"),
    "root": ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
    "the chart's own label": ({"hostDefaults": {"labels": {"expertmesh.io/role": "head"}}}, "expertmesh.io"),
    "no name": ({"fullnameOverride": "1st"}, "fullnameOverride"),
    "a duration of no unit": ({"upgrade": {"initializingTimeout": "soon"}}, "initializingTimeout"),
    "a port of none": ({"service": {"port": 0}}, "port"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_can_not_be_is_refused_by_its_key(case: str) -> None:
    values, key = _REFUSED[case]
    with pytest.raises(Refused, match=key):
        _render(values=values)


@pytest.mark.parametrize("case", list(_REFUSED)[::2])
def test_the_other_helm_refuses_it_as_well(case: str) -> None:
    """It reads schemas with another library, which has other words."""
    values, key = _REFUSED[case]
    with pytest.raises(Refused, match=key):
        Helm(3).template(CHART, [CI / "cpu-values.yaml"], values)


def test_old_clusters_are_refused() -> None:
    with pytest.raises(Refused, match=r"1\.29"):
        _render(kubernetes="1.28.0")
