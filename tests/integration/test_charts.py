"""Every chart × its examples of values × its switches, on helm 3 and helm 4: what is rendered is valid and safe.

A chart joins by its files; see tests/charts/matrix.py.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml

from tests.charts import matrix
from tests.charts.crd_schema import crd_problems, kuberay_schema
from tests.charts.helm import CHARTS, NAMESPACE, Helm, Object, names, of_kind
from tests.charts.kuberay_rules import kuberay_problems
from tests.charts.kubernetes_schemas import VERSIONS, pod_templates, schema_problems, template_problems
from tests.charts.other_kinds import other_problems
from tests.charts.pod_security import security_problems
from tests.charts.selectors import matches, pods
from tests.charts.values_readme import renewed, undocumented
from tests.charts.values_schema import formatted, refreshed

_ROWS = matrix.rows()
_CHARTS = matrix.charts()
# Kinds that live outside namespaces.
_CLUSTER_WIDE = frozenset({"ClusterRole", "ClusterRoleBinding", "PriorityClass", "Namespace", "StorageClass"})


@pytest.fixture(scope="module", params=[3, 4], ids=["helm3", "helm4"])
def helm(request: pytest.FixtureRequest) -> Helm:
    return Helm(request.param)


def test_the_table_is_of_all_charts_and_long_enough() -> None:
    """A chart without examples would not be tested at all, and nobody would notice."""
    assert {row.chart for row in _ROWS} == {file.parent.name for file in CHARTS.glob("*/Chart.yaml")}
    assert len(_ROWS) >= 40
    assert len({str(row) for row in _ROWS}) == len(_ROWS)


def test_versions_of_helm(helm: Helm) -> None:
    said = helm.run("version", "--short")
    assert said.startswith({3: "v3.17.", 4: "v4."}[helm.major]), said


@pytest.mark.parametrize("chart", _CHARTS)
def test_lint(helm: Helm, chart: str) -> None:
    """As it is, and with each of its examples."""
    for files in ([], *([file] for file in matrix.value_files(chart))):
        assert "0 chart(s) failed" in helm.lint(chart, files)


@pytest.mark.parametrize("row", _ROWS, ids=str)
def test_row(helm: Helm, row: matrix.Row) -> None:
    """Schemas, KubeRay's rules, security, selectors. The same objects are looked at once, whoever renders them."""
    objects = row.render(helm)
    assert objects
    problems = [f"{names(item)}: {problem}" for item in objects for problem in _problems(item)]
    problems += security_problems(objects) + _selector_problems(objects)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("row", _ROWS, ids=str)
def test_both_helms_render_the_same(row: matrix.Row) -> None:
    assert _sorted(row.render(Helm(3))) == _sorted(row.render(Helm(4)))


@pytest.mark.parametrize("chart", _CHARTS)
def test_values_are_described(chart: str) -> None:
    values = (CHARTS / chart / "values.yaml").read_text()
    assert list(undocumented(values)) == []
    readme = (CHARTS / chart / "README.md").read_text()
    assert readme == renewed(readme, values), "run: python -m tests.charts.values_readme"


@pytest.mark.parametrize("chart", _CHARTS)
def test_values_have_a_schema_that_refuses_unknown_keys_everywhere(chart: str) -> None:
    schema = json.loads((CHARTS / chart / "values.schema.json").read_text())
    assert formatted(schema) == formatted(refreshed(schema)), "run: python -m tests.charts.values_schema"
    assert list(_open_objects(schema, "")) == []
    values = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())
    assert set(schema["properties"]) == set(values)


def _problems(item: Object) -> list[str]:
    """What is wrong with one object by itself."""
    found = []
    if not item["metadata"].get("namespace") and item["kind"] not in _CLUSTER_WIDE:
        found.append("no namespace")
    elif item["metadata"].get("namespace", NAMESPACE) != NAMESPACE:
        found.append("another namespace than the release's")
    ray = kuberay_schema(item)
    if ray is not None:
        found += crd_problems(item, ray) + kuberay_problems(item)
        for path, template in pod_templates(item):
            for version in VERSIONS:
                found += [f"{version} {path}: {text}" for text in template_problems(template, version)]
        return found
    other = other_problems(item)
    if other is not None:
        return found + other
    for version in VERSIONS:
        known = schema_problems(item, version)
        # Of a kind that nothing is known of, nothing could be found.
        found += [f"{version}: unknown kind {item['apiVersion']}/{item['kind']}"] if known is None else known
    return found


def _selector_problems(objects: list[Object]) -> list[str]:
    """What selects no pod, or leads to a port that its pods have not; budgets that are none, or none can be kept."""
    all_pods, found = pods(objects), []
    twice = [key for key, count in Counter(map(names, objects)).items() if count > 1]
    found += [f"{name} is there twice" for name in twice]
    for item in of_kind(objects, "NetworkPolicy"):
        if not any(matches(item["spec"]["podSelector"], pod.labels) for pod in all_pods):
            found.append(f"{names(item)} selects no pod")
    for item in of_kind(objects, "PodDisruptionBudget"):
        meant = [pod for pod in all_pods if matches(item["spec"]["selector"], pod.labels)]
        keep = item["spec"].get("minAvailable")
        if not meant:
            found.append(f"{names(item)} selects no pod")
        if type(keep) is not int or "maxUnavailable" in item["spec"]:
            found.append(f"{names(item)}: minAvailable is {keep!r}, no whole number")
        elif keep < 1:
            found.append(f"{names(item)}: keeps nothing")
    for item in of_kind(objects, "Service"):
        selector = {"matchLabels": item["spec"]["selector"]}
        meant = [pod for pod in all_pods if matches(selector, pod.labels)]
        if not meant:
            found.append(f"{names(item)} selects no pod")
        for pod in meant:
            for port in item["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                if target not in pod.ports and target not in pod.ports.values():
                    found.append(f"{names(item)}: {pod.name} has no port {target}")
    return found


def _sorted(objects: list[Object]) -> list[Object]:
    return sorted(objects, key=lambda item: (item["kind"], item["metadata"]["name"]))


def _open_objects(schema: object, path: str) -> list[str]:
    """Mappings of a schema that admit any key without saying of what kind its value is."""
    found = []
    if isinstance(schema, dict):
        if (
            "properties" in schema
            and not path.endswith("properties")
            and schema.get("additionalProperties") is not False
        ):
            found.append(path)
        for key, below in schema.items():
            found += _open_objects(below, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, below in enumerate(schema):
            found += _open_objects(below, f"{path}/{index}")
    return found
