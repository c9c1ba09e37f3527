from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.config import Config, LoadedConfig, load_config
from cluster.config_placement import ReplicaRules
from cluster.errors import ConfigError

HOSTS = "hosts: [{count: 4}]\n"
RULES = """\
placement:
  replicas:
    layers: {0: 3}
    hottest: {share: 0.1, replicas: 4, counts: c.json}
"""
VARIABLE = "EXPERTMESH__PLACEMENT__REPLICAS"


def load(folder: Path, text: str, environ: Mapping[str, str]) -> LoadedConfig:
    file = folder / "given.yaml"
    file.write_text(HOSTS + text)
    return load_config(file, {}, environ)


def test_a_number_is_a_rule_for_all(tmp_path: Path) -> None:
    placement = load(tmp_path, "placement: {replicas: 2}", {}).config.placement
    assert (placement.replicas, placement.rules) == (2, ReplicaRules(default=2))


def test_rules_of_several_sources_are_merged_and_have_origins(tmp_path: Path) -> None:
    loaded = load(tmp_path, RULES, {f"{VARIABLE}__DEFAULT": "2", f"{VARIABLE}__LAYERS": "{29: 3}"})
    rules = loaded.config.placement.replicas
    assert isinstance(rules, ReplicaRules) and rules.hottest is not None
    assert (rules.default, rules.layers) == (2, {0: 3, 29: 3})
    file = f"file {tmp_path}/given.yaml"
    assert {key: str(origin) for key, origin in loaded.origins.items() if ".replicas" in key} == {
        "engine.replicas": "default",
        "placement.replicas.default": f"environment {VARIABLE}__DEFAULT",
        "placement.replicas.layers.0": f"{file}:4",
        "placement.replicas.layers.29": f"environment {VARIABLE}__LAYERS",
        "placement.replicas.hottest.share": f"{file}:5",
        "placement.replicas.hottest.replicas": f"{file}:5",
        "placement.replicas.hottest.counts": f"{file}:5",
    }


def test_a_number_overrides_rules(tmp_path: Path) -> None:
    loaded = load(tmp_path, RULES, {VARIABLE: "3"})
    assert loaded.config.placement.replicas == 3
    assert str(loaded.origins["placement.replicas"]) == f"environment {VARIABLE}"


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ("[{experts: [3]}]", ["placement.pins.0", "a device, a group or a selector"]),
        ("[{device: cuda}]", ["placement.pins.0.experts"]),
        ("[{experts: [], device: cuda}]", ["placement.pins.0.experts"]),
        ("[{experts: [-1], device: cuda}]", ["placement.pins.0.experts.0", "-1"]),
        ("[{experts: [1], device: tpu}]", ["placement.pins.0.device", "tpu"]),
    ],
)
def test_pins_that_say_nothing_are_refused(tmp_path: Path, pins: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"placement: {{pins: {pins}}}", {})
    told = f"{error.value.message} {error.value.hint}"
    assert all(word in told for word in words), told


def test_a_share_is_the_decimal_that_was_written(tmp_path: Path) -> None:
    config = load(tmp_path, RULES, {}).config
    hottest = config.placement.rules.hottest
    assert hottest is not None and hottest.share * 30 == 3
    assert Config.model_validate_json(config.model_dump_json()) == config
