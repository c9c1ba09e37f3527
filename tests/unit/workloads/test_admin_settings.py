"""From the configuration to the admin API that the controller serves."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from actors.api_access import key_digest
from cluster.config import Config
from cluster.deployment import from_document, to_document
from cluster.errors import ConfigError
from cluster.live_versions import LiveVersions
from cluster.messages import AdminSettings, NodeInfo
from cluster.repair_state import Repair
from tests.unit.actors.test_http_server import free_port
from tests.unit.cluster.versions import tiny
from workloads.deploy import blueprint
from workloads.serve import _admin_url, check_ports

NODE = NodeInfo("n", "10.0.0.1", "one", 8, 0, 1 << 34)


def configured(**admin: object) -> Config:
    return Config.model_validate({"admin": admin, "server": {"port": free_port()}})


def test_keys_travel_as_digests(tmp_path: Path) -> None:
    checkpoint = tiny.base(tmp_path)
    config = configured(port=8001, keys=["hush"])
    deployment = blueprint(
        config, checkpoint, "float32", "m", [NODE], versions=LiveVersions("v", {"v": {}})
    ).deployment
    assert deployment.admin == AdminSettings("127.0.0.1", 8001, str(checkpoint.path), (key_digest("hush"),))
    document = to_document(deployment, Repair({}), 0.0)
    assert b"hush" not in document and from_document(document, 0.0)[0].admin == deployment.admin
    assert blueprint(config, checkpoint, "float32", "m", [NODE]).deployment.admin is None, "without versions"
    none = blueprint(Config(), checkpoint, "float32", "m", [NODE], versions=LiveVersions("v", {"v": {}}))
    assert none.deployment.admin is None


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"admin\.port {port} on 127\.0\.0\.1 can't be used") as error:
            check_ports(configured(port=port))
        assert "set another in admin.port" in error.value.hint
    check_ports(configured(port=port))
    check_ports(configured())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8001"),
        ("0.0.0.0", "http://127.0.0.1:8001"),
        ("::", "http://[::1]:8001"),
        ("mesh.example", "http://mesh.example:8001"),
    ],
)
def test_the_address_that_is_printed(host: str, url: str) -> None:
    assert _admin_url(configured(host=host, port=8001, keys=["k"])) == url
    assert _admin_url(Config()) == ""
