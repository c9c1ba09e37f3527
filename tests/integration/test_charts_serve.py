"""The chart expertmesh-serve: what it renders is what the program, Ray and KubeRay expect of it."""

from __future__ import annotations

import importlib
import importlib.util
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.inventory import slots
from cluster.messages import NodeInfo
from cluster.ray_cluster_manifest import read_nodes
from tests.charts import matrix
from tests.charts import serve_chart as chart
from tests.charts.helm import of_kind, one
from tests.charts.kubernetes_schemas import pod_templates
from workloads.engine_resources import engine_nodes, reserved_gpus
from workloads.ray_service import lacking

_ROWS = [
    row for row in matrix.rows() if row.chart == chart.CHART and row.switch in (matrix.PLAIN, "own-store")
]


@pytest.mark.parametrize("row", _ROWS, ids=str)
def test_the_program_reads_its_configuration(row: matrix.Row, tmp_path: Path) -> None:
    """The ConfigMap is what pods mount, what the program reads, and agrees with the groups of pods."""
    objects = row.render(chart.HELM)
    config, groups = chart.config(objects, tmp_path), chart.groups(objects)
    assert config.server.host == "0.0.0.0" and config.server.port == 8080 and config.admin.port == 8081
    assert [key.get_secret_value() for key in config.server.api_keys] == ["an api key"]
    assert [key.get_secret_value() for key in config.admin.keys] == ["an admin key"]
    inside = [host for host in config.hosts if host.name not in groups]
    assert [*inside, *(host for host in config.hosts if host.name in groups)] == list(config.hosts)
    assert [name for name in groups if name != "router"] == [
        host.name for host in config.hosts[len(inside) :]
    ]
    for host in config.hosts:
        group = groups["router" if host in inside else host.name]
        assert host.count == group["replicas"]
        limits = chart.container(group)["resources"]["limits"]
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
    objects = chart.render(example)
    nodes = []
    for name, group in chart.groups(objects).items():
        limits = chart.container(group)["resources"]["limits"]
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
    placed = slots(chart.config(objects, tmp_path).hosts, nodes)
    assert sorted(slot.node_id for slot in placed) == sorted(
        node.node_id for node in nodes if not node.node_id.startswith("router")
    )
    assert all(
        slot.host_id == slot.node_id or slot.group == slot.node_id.rpartition("-")[0] for slot in placed
    )


def test_hosts_in_router_pods_share_the_engines_gpu(tmp_path: Path) -> None:
    """By the planner: one of each in every pod, beside the engine, which Ray then grants them together."""
    objects = chart.render("shared-gpu")
    config = chart.config(objects, tmp_path)
    manifest = tmp_path / "cluster.yaml"
    manifest.write_text(yaml.safe_dump(one(objects, "RayService")))
    nodes = read_nodes(manifest)
    engines = reserved_gpus(
        config, engine_nodes(nodes, config.engine.selector, gpus=config.engine.gpu_shares)
    )
    assert engines == {f"router-{index}": (Decimal("0.4"),) for index in range(2)}
    placed = {slot.host_id: slot for slot in slots(config.hosts, nodes, reserved_gpus=engines)}
    where = {host_id: slot.node_id for host_id, slot in placed.items()}
    assert where == {
        **{f"{name}-{index}": f"router-{index}" for name in ("near", "narrow") for index in range(2)},
        **{f"cpu-{index}": f"cpu-{index}" for index in range(2)},
    }
    assert placed["narrow-0"].gpus == Decimal("0.3") and placed["cpu-0"].gpus == 0
    near, narrow, _ = config.hosts
    assert (narrow.memory_limit, narrow.kernel) == (24 << 30, "vllm-cuda-fp8")
    assert (near.memory_limit, near.kernel, near.memory) == (None, "auto", 20 << 30)
    assert not lacking(config, nodes)


def _cpus(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1)


@pytest.mark.parametrize(("quantity", "threads"), [("8", 8), (8, 8), ("7500m", 7), ("2.5", 2), ("500m", 1)])
def test_threads_are_whole_cpus_of_the_limit(quantity: str | int, threads: int, tmp_path: Path) -> None:
    limits = {"limits": {"cpu": quantity, "memory": "8Gi"}}
    objects = chart.render(
        values={
            "router": {"resources": limits},
            "hostDefaults": {"resources": limits},
            "hostGroups": [{"name": "a", "replicas": 2}],
        }
    )
    config = chart.config(objects, tmp_path)
    assert config.engine.threads == threads
    assert config.hosts[0].threads == threads


def test_serve_config_is_what_ray_serve_reads() -> None:
    """By Ray Serve's own schema; its proxy runs on the head alone, and listens where KubeRay asks it."""
    from ray.serve.config import ProxyLocation
    from ray.serve.schema import ServeDeploySchema

    from workloads.ray_service import Arguments

    text = one(chart.render(), "RayService")["spec"]["serveConfigV2"]
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert parsed.proxy_location == ProxyLocation.HeadOnly
    assert (parsed.http_options.host, parsed.http_options.port) == ("0.0.0.0", 8000)
    (application,) = parsed.applications
    assert (application.name, application.route_prefix) == ("expertmesh", "/")
    assert application.import_path == "workloads.ray_service:application"
    module, _, name = application.import_path.partition(":")
    assert importlib.util.find_spec(module) is not None
    assert callable(getattr(importlib.import_module(module), name))
    # Where every pod has the ConfigMap.
    assert Arguments.model_validate(application.args).config == Path("/etc/expertmesh/expertmesh.yaml")
    for _, template in pod_templates(one(chart.render(), "RayService")):
        (container,) = template["spec"]["containers"]
        paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert paths["config"] == "/etc/expertmesh"
        assert volumes["config"]["configMap"]["name"] == "mesh-expertmesh-serve"
        assert set(paths) == set(volumes)


def test_labels_of_ray_nodes_are_those_of_pods_and_selectors(tmp_path: Path) -> None:
    """Ray's labels come from the groups' field, never from rayStartParams, and selectors of the program match them."""
    objects = chart.render("mixed")
    groups, config = chart.groups(objects), chart.config(chart.render("mixed"), tmp_path)
    assert groups["router"]["labels"] == {"expertmesh.io/role": "router"}
    assert groups["cpu"]["labels"] == {
        "expertmesh.io/role": "host",
        "expertmesh.io/group": "cpu",
        "zone": "b",
    }
    head = chart.cluster(objects)["headGroupSpec"]
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
    objects = chart.render("mixed")
    groups = chart.groups(objects)
    probe = chart.container(groups["router"])["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["port"]) == ("/health", "http")
    for name in ("gpu", "cpu"):
        assert chart.container(groups[name])["readinessProbe"]["httpGet"]["port"] == 52365
    assert {"name": "http", "containerPort": 8080} in chart.container(groups["router"])["ports"]


def test_ports_of_one_pod_are_apart() -> None:
    """KubeRay lets Ray export metrics on 8080, where the API listens, if it is not told otherwise."""
    objects = chart.render()
    for group in (chart.cluster(objects)["headGroupSpec"], *chart.groups(objects).values()):
        ports = [port["containerPort"] for port in chart.container(group)["ports"]]
        assert len(set(ports)) == len(ports)
        exported_at = {p["name"]: p["containerPort"] for p in chart.container(group)["ports"]}["metrics"]
        assert group["rayStartParams"]["metrics-export-port"] == str(exported_at)
    # All that KubeRay's head Service and its health checks look for by name.
    names = {port["name"] for port in chart.container(chart.cluster(objects)["headGroupSpec"])["ports"]}
    assert {"gcs-server", "dashboard", "client", "serve", "metrics", "admin"} == names


def test_the_head_computes_nothing_and_a_router_pod_holds_one_engine() -> None:
    objects = chart.render("gpu")
    assert chart.cluster(objects)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert chart.groups(objects)["router"]["rayStartParams"]["num-cpus"] == "1"


def test_token_authentication_is_on_unless_switched_off() -> None:
    assert chart.cluster(chart.render())["authOptions"] == {"mode": "token"}
    assert chart.cluster(chart.render("rocksdb"))["authOptions"] == {
        "mode": "token",
        "secretName": "ray-token",
    }
    assert chart.cluster(chart.render(values={"rayAuth": {"mode": "disabled"}}))["authOptions"] == {
        "mode": "disabled"
    }


def test_a_changed_configuration_is_a_changed_cluster_and_nothing_else_is() -> None:
    """KubeRay brings up a new cluster where the spec changes: for a new configuration, not for a new chart."""

    def templates(values: dict[str, Any] | None = None) -> list[Any]:
        return [template for _, template in pod_templates(one(chart.render(values=values), "RayService"))]

    assert all(
        a != b for a, b in zip(templates(), templates({"config": {"log_level": "debug"}}), strict=True)
    )
    assert templates() == templates({"monitoring": {"rules": {"enabled": True}}})
    for template in templates():
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(template["metadata"]["labels"])


def test_images() -> None:
    """CPU pods run the image, GPU pods its variant; a digest counts before a tag."""
    objects = chart.render("mixed")
    groups = chart.groups(objects)
    assert chart.container(groups["cpu"])["image"] == "expertmesh:0.1.0"
    assert (
        chart.container(groups["gpu"])["image"]
        == chart.container(groups["router"])["image"]
        == "expertmesh:0.1.0-gpu"
    )
    digest = "sha256:" + "a" * 64
    assert chart.container(chart.groups(chart.render("gpu", {"image": {"gpuDigest": digest}}))["gpu"])[
        "image"
    ].endswith(f"@{digest}")


def test_scaling_by_the_operator_leaves_rays_autoscaler_off(tmp_path: Path) -> None:
    objects = chart.render("mixed")
    assert chart.cluster(objects)["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in chart.cluster(objects)
    cpu = chart.groups(objects)["cpu"]
    assert (cpu["minReplicas"], cpu["replicas"], cpu["maxReplicas"]) == (2, 3, 8)
    (host,) = [host for host in chart.config(objects, tmp_path).hosts if host.name == "cpu"]
    assert host.autoscale is not None and host.autoscale.down_cooldown == 600


def test_scaling_by_ray() -> None:
    cluster = chart.cluster(chart.render("autoscaled"))
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
    assert chart.cluster(chart.render(example)).get("gcsFaultToleranceOptions") == expected


def test_a_volume_for_rays_tables_that_kuberay_makes() -> None:
    options = chart.cluster(chart.render(values={"gcsFaultTolerance": {"backend": "rocksdb"}}))[
        "gcsFaultToleranceOptions"
    ]
    assert options["storage"] == {
        "size": "10Gi",
        "accessModes": ["ReadWriteOnce"],
        "deletionPolicy": "DeleteWithCluster",
    }


def test_claims() -> None:
    """What the chart makes of storage, and keeps when it goes."""
    assert [claim["metadata"]["name"] for claim in of_kind(chart.render(), "PersistentVolumeClaim")] == [
        "mesh-expertmesh-serve-versions"
    ]
    made = of_kind(
        chart.HELM.template(chart.CHART, [], {"keys": {"existingSecret": "k"}}),
        "PersistentVolumeClaim",
    )
    assert [claim["spec"]["accessModes"] for claim in made] == [["ReadWriteMany"], ["ReadWriteMany"]]
    assert all(claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for claim in made)
    stored = chart.render("object-store")
    assert not of_kind(stored, "PersistentVolumeClaim")
    for _, template in pod_templates(one(stored, "RayService")):
        assert "versions" not in {volume["name"] for volume in template["spec"]["volumes"]}
        assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "object-store"}}]


def test_keys_are_made_where_none_are_named() -> None:
    secret = one(chart.HELM.template(chart.CHART, [], {}), "Secret")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert set(secret["data"]) == set(chart.KEYS)
    assert len(set(secret["data"].values())) == 2 and all(len(key) > 40 for key in secret["data"].values())
    assert not of_kind(chart.render(), "Secret")
