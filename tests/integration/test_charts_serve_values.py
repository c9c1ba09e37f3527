"""The chart expertmesh-serve: values that can't be are refused, by their keys."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cluster.config import Config
from tests.charts import serve_chart as chart
from tests.charts.helm import CHARTS, Helm, Refused, one


def test_values_may_say_all_of_the_configuration_but_what_the_chart_decides() -> None:
    """A key that the program gains is missing here until the chart says whose it is."""
    schema = json.loads((CHARTS / chart.CHART / "values.schema.json").read_text())["properties"]["config"]
    decided = {
        "": {"hosts", "ray", "admin"},
        "engine": {"replicas", "device", "gpus", "selector"},
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
    assert (
        one(chart.render(release="r" * 30), "RayService")["metadata"]["name"] == f"{'r' * 30}-{chart.CHART}"
    )
    with pytest.raises(Refused, match="fullnameOverride"):
        chart.render(release="r" * 31)


_ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "resources": {"limits": {"cpu": 1, "memory": "1Gi", "nvidia.com/gpu": 1}},
}
_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"replicas": 3}, "replicas"),
    "unknown key of a group": ({"hostGroups": [{"name": "a", "count": 2}]}, "hostGroups.0.count"),
    "unknown key of a toleration": ({"head": {"tolerations": [{"keys": "a"}]}}, "head.tolerations.0.keys"),
    "unknown key of the configuration": (
        {"config": {"placement": {"replica": 2}}},
        "config.placement.replica",
    ),
    "the chart's part of the configuration": ({"config": {"hosts": []}}, "config.hosts"),
    "the chart's part of a section": ({"config": {"server": {"port": 80}}}, "config.server.port"),
    "wrong choice in the configuration": (
        {"config": {"placement": {"no_replica": "ignore"}}},
        "config.placement.no_replica",
    ),
    "latest": ({"image": {"tag": "latest"}}, "image.tag"),
    "latest for GPUs": ({"image": {"gpuTag": "latest"}}, "image.gpuTag"),
    "half a digest": ({"image": {"digest": "sha256:abc"}}, "image.digest"),
    "unknown device": ({"hostGroups": [{"name": "a", "device": "tpu"}]}, "hostGroups.0.device"),
    "no groups": ({"hostGroups": []}, "hostGroups"),
    "a group without a name": ({"hostGroups": [{"replicas": 2}]}, "hostGroups.0.name"),
    "a group called as the routers are": ({"hostGroups": [{"name": "router"}]}, "hostGroups.0.name"),
    "capitals in a name": ({"hostGroups": [{"name": "GPU"}]}, "hostGroups.0.name"),
    "two groups of a name": ({"hostGroups": [{"name": "a"}, {"name": "a"}]}, "hostGroups.1.name"),
    "no replicas": ({"router": {"replicas": 0}}, "router.replicas"),
    "a share of pods": ({"router": {"minAvailable": "50%"}}, "router.minAvailable"),
    "all pods kept": (
        {"hostGroups": [{"name": "a", "replicas": 2, "minAvailable": 2}]},
        "hostGroups.0.minAvailable",
    ),
    "a share of a processor": ({"router": {"gpus": 0.5}}, "router.gpus"),
    "hosts beside no GPU": ({"router": {"hosts": [{"name": "a", "gpus": 0.5}]}}, "router.hosts"),
    "a host without its share": ({"router": {**_ON_GPU, "hosts": [{"name": "a"}]}}, "router.hosts.0.gpus"),
    "more shares than GPUs": (
        {
            "router": {
                **_ON_GPU,
                "gpus": 0.5,
                "hosts": [{"name": "a", "gpus": 0.3}, {"name": "b", "gpus": 0.3}],
            }
        },
        "router.hosts: engine and hosts take 1.1 GPUs in all",
    ),
    "a name in routers and groups": (
        {
            "router": {**_ON_GPU, "gpus": 0.5, "hosts": [{"name": "a", "gpus": 0.5}]},
            "hostGroups": [{"name": "a"}],
        },
        "hostGroups.0.name: a is the name of router.hosts.0 too",
    ),
    "no GPU": ({"hostGroups": [{"name": "a", "device": "cuda"}]}, "hostGroups.0.resources.limits"),
    "a GPU for nobody": (
        {"router": {"resources": {"limits": {"cpu": 1, "memory": "1Gi", "nvidia.com/gpu": 1}}}},
        "router.resources.limits",
    ),
    "no limit": (
        {"hostGroups": [{"name": "a", "resources": {"limits": {"cpu": 1}}}]},
        "hostGroups.0.resources.limits.memory",
    ),
    "nobody scales": (
        {"hostGroups": [{"name": "a", "autoscale": {"min": 1, "max": 2}}]},
        "hostGroups.0.autoscale",
    ),
    "bounds without a maximum": (
        {"operator": {"enabled": True}, "hostGroups": [{"name": "a", "autoscale": {"min": 1}}]},
        "hostGroups.0.autoscale.max",
    ),
    "outside its bounds": (
        {
            "operator": {"enabled": True},
            "hostGroups": [{"name": "a", "replicas": 5, "autoscale": {"min": 1, "max": 2}}],
        },
        "hostGroups.0.replicas",
    ),
    "two that scale": (
        {"operator": {"enabled": True}, "autoscaling": {"enabled": True}},
        "autoscaling.enabled",
    ),
    "Ray without tokens": ({"rayVersion": "2.51.0"}, "rayVersion"),
    "Ray of no version": ({"rayVersion": "nightly"}, "rayVersion"),
    "Redis nowhere": ({"gcsFaultTolerance": {"backend": "redis"}}, "gcsFaultTolerance.redis.address"),
    "a volume that two would write": (
        {"gcsFaultTolerance": {"backend": "rocksdb", "rocksdb": {"claimName": "a"}}},
        "gcsFaultTolerance.rocksdb.claimName",
    ),
    "half a Secret's key": (
        {"gcsFaultTolerance": {"redis": {"passwordSecret": {"name": "a"}}}},
        "gcsFaultTolerance.redis.passwordSecret.key",
    ),
    "two stores": (
        {"storage": {"versions": {"url": "s3://a/b", "existingClaim": "c"}}},
        "storage.versions.existingClaim",
    ),
    "a store of no kind": ({"storage": {"versions": {"url": "bucket"}}}, "storage.versions.url"),
    "a route of no Gateway": ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
    "a route that is closed": (
        {"gateway": {"enabled": True, "parentRefs": [{"name": "public"}]}},
        "networkPolicy.gatewayFrom",
    ),
    "a load balancer that is closed": ({"service": {"type": "LoadBalancer"}}, "networkPolicy.gatewayFrom"),
    "a model of one machine": ({"config": {"model": {"path": "default"}}}, "config.model.path"),
    "an Ingress for any name": ({"ingress": {"enabled": True}}, "ingress.hosts"),
    "root": ({"securityContext": {"runAsUse": 0}}, "securityContext.runAsUse"),
    "the chart's own label": (
        {"hostDefaults": {"labels": {"expertmesh.io/role": "head"}}},
        "expertmesh.io/role",
    ),
    "no name": ({"fullnameOverride": "1st"}, "fullnameOverride"),
    "a duration of no unit": ({"upgrade": {"initializingTimeout": "soon"}}, "upgrade.initializingTimeout"),
    "a port of none": ({"service": {"port": 0}}, "service.port"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_can_not_be_is_refused_by_its_key(case: str) -> None:
    values, key = _REFUSED[case]
    with pytest.raises(Refused) as refused:
        chart.render(values=values)
    assert _names(str(refused.value), key), refused.value


@pytest.mark.parametrize("case", list(_REFUSED)[::2])
def test_the_other_helm_refuses_it_as_well(case: str) -> None:
    """It reads schemas with another library, which has other words."""
    values, key = _REFUSED[case]
    with pytest.raises(Refused) as refused:
        Helm(3).template(chart.CHART, [chart.CI / "cpu-values.yaml"], values)
    assert _names(str(refused.value), key), refused.value


def _names(said: str, key: str) -> bool:
    """Whether a message names the key: whole, or the part that it is missing in or unknown to and then its own name.

    One helm writes hostGroups.0.name, the other /hostGroups/0/name.
    """
    section, _, name = key.rpartition(".")
    plain = said.replace("/", ".")
    whole = re.escape(key.replace("/", "."))
    within = rf"\b{re.escape(section)}" if section else r"(?:\(root\)|at '')"
    return bool(re.search(rf"\b{whole}\b|{within}(?![\w.])[^\n]*\b{name}\b", plain))


def test_a_message_that_names_another_key_does_not_count() -> None:
    assert _names("- at '/hostGroups/0': additional properties 'count' not allowed", "hostGroups.0.count")
    assert _names("- hostGroups.0: Additional property count is not allowed", "hostGroups.0.count")
    assert not _names("- hostGroups.1: Additional property count is not allowed", "hostGroups.0.count")
    assert not _names(
        "- at '/hostGroups/0/labels': additional properties 'count' not allowed", "hostGroups.0.count"
    )
    assert _names("- at '': additional properties 'replicas' not allowed", "replicas")
    assert not _names("- hostGroups.0: Additional property counts is not allowed", "hostGroups.0.count")


def test_old_clusters_are_refused() -> None:
    with pytest.raises(Refused, match=r"1\.29"):
        chart.render(kubernetes="1.28.0")
