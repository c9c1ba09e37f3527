from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from cluster.config import Config, load_config
from cluster.config_autoscale import AutoscaleConfig
from cluster.errors import ConfigError


def load(folder: Path, autoscale: str, rest: str = "") -> Config:
    file = folder / "given.yaml"
    file.write_text(f"hosts:\n- count: 2\n  autoscale: {autoscale}\n{rest}")
    return load_config(file, {}, {}).config


def test_without_the_key_nothing_is_scaled() -> None:
    assert Config().hosts[0].autoscale is None


def test_bounds_are_enough(tmp_path: Path) -> None:
    settings = load(tmp_path, "{min: 1, max: 8}").hosts[0].autoscale
    assert settings == AutoscaleConfig(min=1, max=8)
    assert settings is not None and settings.memory is None


def test_everything_can_be_said(tmp_path: Path) -> None:
    text = "{min: 2, max: 2, utilisation: 0.5, queue: 0.25, memory: 0.9, up_cooldown: 1m, down_cooldown: 1h}"
    config = load(tmp_path, text)
    settings = config.hosts[0].autoscale
    assert settings is not None
    assert (settings.utilisation, settings.queue, settings.memory) == tuple(
        map(Decimal, ("0.5", "0.25", "0.9"))
    )
    assert (settings.up_cooldown, settings.down_cooldown) == (60, 3600)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_metric_can_be_left_out(tmp_path: Path) -> None:
    settings = load(tmp_path, "{min: 1, max: 2, queue: null}").hosts[0].autoscale
    assert settings is not None and settings.queue is None


@pytest.mark.parametrize(
    ("autoscale", "expected"),
    [
        ("{min: 1}", "given.yaml:3: hosts.0.autoscale.max: is missing"),
        ("{min: 4, max: 3}", "given.yaml:3: hosts.0.autoscale.max = 3: is below min, which is 4"),
        ("{min: 3, max: 4}", "given.yaml:2: hosts.0.count: 2 hosts to begin with, where autoscale allows 3 to 4"),
        ("{min: 1, max: 1}", "hosts.0.count: 2 hosts to begin with, where autoscale allows 1 to 1"),
        ("{min: 0, max: 3}", "hosts.0.autoscale.min = 0: should be greater than or equal to 1"),
        ("{min: 1, max: 3, utilisation: 60}", "utilisation = 60: should be a share above 0 and at most 1"),
        ("{min: 1, max: 3, queue: 0}", "hosts.0.autoscale.queue = 0: should be a number above 0"),
        ("{min: 1, max: 3, queue: true}", "hosts.0.autoscale.queue = true: should be a number above 0"),
        ("{min: 1, max: 3, cpu: 0.5}", "hosts.0.autoscale.cpu = 0.5: unknown key"),
        ("{min: 1, max: 3, cooldown: 1s}", "did you mean hosts.0.autoscale.up_cooldown"),
        ("3", "hosts.0.autoscale = 3: should be a mapping of keys to values\n  its keys: min, max, utilisation"),
    ],
)  # fmt: skip
def test_mistakes_say_where_and_what(tmp_path: Path, autoscale: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, autoscale)
    assert expected in str(caught.value)


def test_copies_of_experts_have_hosts_however_few_there_may_be(tmp_path: Path) -> None:
    load(tmp_path, "{min: 2, max: 3}", "placement: {replicas: 2}")
    with pytest.raises(ConfigError, match="need as many hosts, autoscaling may leave 1") as caught:
        load(tmp_path, "{min: 1, max: 3}", "placement: {replicas: 2}")
    assert "raise a host group's autoscale.min" in caught.value.hint
