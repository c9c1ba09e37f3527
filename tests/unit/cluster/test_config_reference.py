"""docs/configuration.md and examples/ say what the code does."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cluster.config import Config, HostGroup, load_config
from cluster.config_autoscale import AutoscaleConfig
from cluster.config_placement import HottestExperts, PinConfig, ReplicaRules

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_loads(file: Path) -> None:
    loaded = load_config(file, {}, {"EXPERTMESH_API_KEY": "k"})
    assert loaded.config != Config() or file.stem == "laptop"


def test_the_examples_are_there() -> None:
    assert [file.stem for file in EXAMPLES] == ["laptop", "mixed-nodes", "three-hosts"]


def keys(schema: type[BaseModel], above: str = "") -> dict[str, object]:
    """Dotted keys with their defaults, as the reference writes them."""
    found: dict[str, object] = {}
    for name, field in schema.model_fields.items():
        if name == "hosts":
            found.update(keys(HostGroup, "hosts[]."))
        elif isinstance(field.default, BaseModel):
            found.update(keys(type(field.default), f"{above}{name}."))
        else:
            found[above + name] = field.default
    return found


def test_the_reference_names_every_key_with_its_default_and_no_other() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = dict(line.strip("| ").split(" | ")[:2] for line in text.splitlines() if line.startswith("| `"))
    assert list(rows) == [f"`{key}`" for key in keys(Config)]
    for key, default in keys(Config).items():
        section, _, name = key.rpartition(".")
        model: type[BaseModel] = Config
        if section:
            model = HostGroup if section == "hosts[]" else type(attrgetter(section)(Config()))
        written = yaml.safe_load(rows[f"`{key}`"].strip("`"))
        assert getattr(model.model_validate({name: written}), name) == default, key


@pytest.mark.parametrize(
    ("title", "schemas"),
    [
        ("How many copies", (ReplicaRules, HottestExperts)),
        ("Autoscaling", (AutoscaleConfig,)),
        ("Pins", (PinConfig,)),
    ],
)
def test_the_reference_names_what_may_be_in_a_mapping(
    title: str, schemas: tuple[type[BaseModel], ...]
) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    section = text.partition(f"### {title}\n")[2].partition("\n## ")[0]
    for schema in schemas:
        assert all(f"`{key}`" in section or f" {key}:" in section for key in schema.model_fields)


def test_the_reference_s_defaults_of_autoscaling_are_the_code_s() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    section = text.partition("### Autoscaling\n")[2].partition("\n## ")[0]
    lines = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("- `")}
    said = {key: lines[key].partition(" if it is not given")[0].rpartition("; ")[2] for key in lines}
    given = {key: yaml.safe_load(value) for key, value in said.items() if key not in ("min", "memory")}
    assert AutoscaleConfig.model_validate({"min": 1, "max": 1, **given}) == AutoscaleConfig(min=1, max=1)
    assert AutoscaleConfig(min=1, max=1).memory is None and "`null`, the default" in lines["memory"]


def test_the_references_examples_load(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(blocks) == 9
    for block in blocks:
        file = tmp_path / "block.yaml"
        file.write_text(block)
        load_config(file, {}, {"EXPERTMESH_API_KEY": "k"})
