"""The operator's contract on a real API server, with a user who may do what the chart's Role says and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.charts.helm import CHARTS, Helm, of_kind
from tests.kube_api_server import kube_api_server as kube_api_server
from tests.operator_contract import USED, OperatorContract
from tests.real_kube import RealKube, with_kuberays_kinds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Unverified HTTPS", "ignore:You should not use"),
]


@pytest.fixture(scope="module")
def server(kube_api_server: Path) -> RealKube:
    return with_kuberays_kinds(kube_api_server)


@pytest.fixture
def kube(server: RealKube) -> Iterator[RealKube]:
    server.clear()
    yield server
    server.clear()


class TestOperator(OperatorContract):
    """The contract, for real."""


@pytest.mark.parametrize("major", [3, 4])
def test_the_chart_allows_exactly_what_is_used(major: int) -> None:
    rendered = Helm(major).template(
        "expertmesh-operator", [CHARTS / "expertmesh-operator/ci/default-values.yaml"]
    )
    rules = [
        rule for kind in ("Role", "ClusterRole") for item in of_kind(rendered, kind) for rule in item["rules"]
    ]
    allowed = {
        (group, plural, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for plural in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == USED
