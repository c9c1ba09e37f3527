from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.config_capacity import CapacityConfig
from cluster.errors import ConfigError
from cluster.messages import CapacitySettings


def load(folder: Path, text: str, environ: dict[str, str] | None = None) -> CapacityConfig:
    file = folder / "given.yaml"
    file.write_text(f"placement:\n  capacity: {{{text}}}\n")
    return load_config(file, {}, environ or {}).config.placement.capacity


def test_without_a_word_experts_take_what_comes(tmp_path: Path) -> None:
    assert load(tmp_path, "") == CapacityConfig()
    assert CapacityConfig().settings() == CapacitySettings()
    assert CapacitySettings().policy == "dropless"


def test_what_the_file_and_the_environment_say_reaches_the_engine(tmp_path: Path) -> None:
    environ = {"EXPERTMESH__PLACEMENT__CAPACITY__TARGET": "0.2"}
    told = load(tmp_path, "policy: drop, factor: 2, min_rows: 1, coefficient: 0", environ).settings()
    assert told == CapacitySettings("drop", factor=2.0, min_rows=1, coefficient=0.0, target=0.2)


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("policy: dropped", "policy = 'dropped'", "did you mean drop"),
        ("factor: 0", "factor = 0", "a number above zero"),
        ("factor: true", "factor = true", "a number above zero"),
        ("factor: .inf", "factor = inf", "a number above zero"),
        ("min_rows: 0", "min_rows = 0", "greater than or equal to 1"),
        ("coefficient: -1", "coefficient = -1", "at least zero"),
        ("coefficient_max: much", "coefficient_max = 'much'", "at least zero"),
        ("target: 1", "target = 1", "at least 0 and below 1"),
        ("coefficient: 9", "coefficient", "9 is not between coefficient_min, 0, and coefficient_max, 8"),
        ("coefficient_min: 2, coefficient_max: 1", "coefficient_max = 1", "is below coefficient_min, 2"),
        ("capacity_factor: 2", "capacity_factor", "unknown key"),
    ],
)
def test_mistakes_say_which_key_and_what_is_wrong(tmp_path: Path, text: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert f"given.yaml:2: placement.capacity.{key}" in str(caught.value)
    assert problem in str(caught.value)
